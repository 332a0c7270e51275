"""The core tests as other machines would run them: other instruction sets, thread counts and rounding.

    python -m tests.machines NAME          under one of MACHINES
    python -m tests.machines next          the quick ones under the next one; each run takes its turn
    python -m tests.machines all           under each, one after the other: all under those of WHOLE, under
                                           the others the quick ones
    ... -- -k greedy -n 2                  what follows is pytest's; -m slow runs the slow ones instead

Kernels are chosen when torch starts, so pytest gets a process of its own with the variables set. On a CPU of
another maker a variable may change nothing; `rounding` differs everywhere (tests/rounding.py).
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

THREADS, ROUNDING = "BLOCKROLL_TEST_THREADS", "BLOCKROLL_TEST_ROUNDING"
LOWEST = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
MACHINES = {
    "mkl-avx2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "mkl-sse4.2": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    # Torch's lowest build lacks what bfloat16 attention needs where oneDNN sees a matrix unit: it sees none.
    "aten-default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "rounding": {ROUNDING: "1"},
    "lowest": LOWEST,
    "two-threads": {THREADS: "2"},
    "lowest-two-threads": {**LOWEST, THREADS: "2"},
}
# The law, numerics, golden rollouts, and what an engine in one process must satisfy.
CORE = ("tests/law", "tests/numerics", "tests/golden", "tests/invariants", "tests/unit/test_equality.py")
# Of them, what rounding reaches most: enough for a turn of every `make test`.
QUICK = (
    "tests/numerics/test_policy.py",
    "tests/golden",
    "tests/invariants/test_engine.py",
    "tests/unit/test_equality.py",
)
WHOLE = ("rounding", "lowest")  # these differ most; each of the others is a part of one
LEFT_OUT = ("*ray*", "*trl*")  # processes and trainers of their own
TURN = Path(sys.prefix) / ".next_machine"


def main() -> int:
    """The exit status of the first run that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("machine", choices=[*MACHINES, "next", "all"])
    parser.add_argument("pytest", nargs=argparse.REMAINDER, help="arguments for pytest, behind --")
    given = parser.parse_args()
    arguments = [each for each in given.pytest if each != "--"]
    match given.machine:
        case "all":
            chosen = {name: CORE if name in WHOLE else QUICK for name in MACHINES}
        case "next":
            chosen = {next_in_turn(): QUICK}
        case name:
            chosen = {name: CORE}
    failed = [name for name, tests in chosen.items() if run(name, tests, arguments)]
    if failed:
        print(f"core tests failed under: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def run(name: str, tests: Sequence[str], arguments: list[str]) -> int:
    """These tests under one machine, pytest's exit status."""
    variables = MACHINES[name]
    shown = " ".join(f"{key}={value}" for key, value in variables.items())
    print(f"core tests under {name}: {shown}", flush=True)
    threads = variables.get(THREADS, "1")
    if threads != "1":
        arguments = [*arguments, "-n", "0"]  # two processes with two threads each would wait for each other
    ignored = [f"--ignore-glob={pattern}" for pattern in LEFT_OUT]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *tests, *ignored, *arguments],
        env={**os.environ, **variables, "OMP_NUM_THREADS": threads},
        check=False,
    ).returncode


def next_in_turn() -> str:
    """Each machine after the other, over the runs of this environment."""
    names = list(MACHINES)
    turn = int(TURN.read_text()) if TURN.is_file() else 0
    TURN.write_text(str(turn + 1))
    return names[turn % len(names)]


if __name__ == "__main__":
    sys.exit(main())
