"""What the processor of this machine is."""

import platform
from functools import cache
from pathlib import Path

_DESCRIBED = ("flags", "Features", "model name", "CPU part")  # in Linux's table, of x86 and Arm


@cache
def processor() -> str:
    """The processor's name, as the system has it."""
    names = [line.partition(":")[2].strip() for line in _table() if line.startswith("model name")]
    return names[0] if names else platform.machine()


@cache
def processor_features() -> str:
    """Its name and what it can do: code for one processor may not run on another of other features."""
    return "\n".join(
        [platform.machine(), *sorted({line for line in _table() if line.startswith(_DESCRIBED)})]
    )


def _table() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
