"""Kernels compiled for GPUs that need not be there: what each configuration that ships takes of them.

    python -m tests.compiled [OP ...] [--target gfx942]     rows, by the Triton that is found first

Triton reads a kernel's source from its file, and what it has interpreted it cannot compile: a process of its
own, without TRITON_INTERPRET.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from blockroll.kernels.builds import Build

Row = dict[str, Any]

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "blockroll" / "kernels"
# None is the environment's own; the other lies in a folder, where `make test-slow` puts it.
OTHER_TRITON = Path(sys.prefix) / "triton-3.6.0"
TRITONS = (None, OTHER_TRITON)
MOST_THREADS = 1024  # of a block, on all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A GPU to compile for."""

    of: GPUTarget
    shared: int  # bytes that a block may have


TARGETS = {
    "gfx942": Target(of=GPUTarget("hip", "gfx942", 64), shared=64 << 10),  # MI300X
    "gfx950": Target(of=GPUTarget("hip", "gfx950", 64), shared=160 << 10),  # MI355X
    "sm_90": Target(of=GPUTarget("cuda", 90, 32), shared=227 << 10),  # H100
}


def ops() -> tuple[str, ...]:
    """The operations that have kernels."""
    return tuple(sorted({path.parent.name for path in KERNELS.glob("*/fused*.py")}))


def builds_of(op: str) -> list[Build]:
    """Every configuration of an operation that ships, each once."""
    found: dict[str, Build] = {}
    for path in sorted((KERNELS / op).glob("fused*.py")):
        module = importlib.import_module(f"blockroll.kernels.{op}.{path.stem}")
        found.update((build.label, build) for build in getattr(module, "builds", tuple)())
    return [*found.values()]


def compiled(op: str, build: Build, target: str) -> Row:
    """What a configuration takes on a GPU, and whether that is more than there is."""
    names = [*build.types]
    source = ASTSource(
        fn=build.kernel,
        signature=dict(build.types),
        constexprs={(names.index(name),): value for name, value in build.constants.items()},
        attrs={
            (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name in build.aligned
        },
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    made = triton.compile(source, target=TARGETS[target].of, options=options)
    threads, shared = made.metadata.num_warps * made.metadata.warp_size, made.metadata.shared
    taken = _of_amd(made.asm["amdgcn"]) if "amdgcn" in made.asm else _of_nvidia(made.asm["cubin"])
    problems = []
    if threads > MOST_THREADS:
        problems.append(f"{threads} threads of {MOST_THREADS}")
    if shared > TARGETS[target].shared:
        problems.append(f"{shared} bytes of shared memory of {TARGETS[target].shared}")
    problems += [f"{name} is {taken[name]}" for name in ("scratch", "spills") if taken[name]]
    return {
        "op": op,
        "kernel": build.kernel.__name__,
        "label": build.label,
        "target": target,
        "triton": triton.__version__,
        "warps": build.num_warps,
        "stages": build.num_stages,
        "shared": shared,
        **taken,
        "problems": problems,
    }


def _of_amd(assembly: str) -> dict[str, int]:
    """Vector registers, waves on a SIMD, and what did not fit: as the assembler says at the end."""

    def told(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        assert found, f"the compiler does not say {name}"
        return int(found[1])

    occupancy = re.search(r"; Occupancy:\s*(\d+)", assembly)
    assert occupancy, "the compiler does not say the occupancy"
    return {
        "registers": told("vgpr_count"),
        "occupancy": int(occupancy[1]),
        "scratch": told("private_segment_fixed_size"),
        "spills": told("vgpr_spill_count") + told("sgpr_spill_count"),
    }


def _of_nvidia(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of each thread's stack and of local memory, to which registers spill."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout)}
    return {"registers": found["REG"], "scratch": found["STACK"], "spills": found["LOCAL"]}


def all_compiled(names: Sequence[str], targets: Sequence[str]) -> Iterator[Row]:
    """Every configuration of these operations on these GPUs."""
    for op in names:
        for build in builds_of(op):
            for target in targets:
                yield compiled(op, build, target)


def compile_all(arguments: Sequence[str] = (), tritons: Sequence[Path | None] = TRITONS) -> list[Row]:
    """A row for each configuration that ships, GPU and Triton; whether all fit is for the reader."""
    rows = []
    for folder in tritons:
        before = [] if folder is None else [str(folder)]
        path = os.pathsep.join([*before, str(ROOT)])
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-m", "tests.compiled", *arguments],
            env={**environment, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        has_problems = any(row["problems"] for row in found)
        if done.returncode != int(has_problems) or not found:
            raise RuntimeError(f"compiling ended with status {done.returncode}: {done.stderr[-2000:]}")
        rows += found
    return rows


def main() -> int:
    """1 where any configuration does not fit, behind a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("ops", nargs="*", help=f"of {', '.join(ops())}; all without any")
    parser.add_argument("--target", action="append", choices=[*TARGETS])
    given = parser.parse_args()
    unknown = {*given.ops} - {*ops()}
    if unknown:
        parser.error(f"there is no kernel of {', '.join(sorted(unknown))}; there are {', '.join(ops())}")
    has_problems = False
    for row in all_compiled(given.ops or ops(), given.target or [*TARGETS]):
        print(json.dumps(row), flush=True)
        has_problems |= bool(row["problems"])
    return int(has_problems)


if __name__ == "__main__":
    raise SystemExit(main())
