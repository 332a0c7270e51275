"""Builds `layers.c` with the machine's own compiler, once for each type of weights, and loads it.

What is built is kept in the cache folder under a name that says what it was built of: source, flags, compiler
and processor. It is put there whole or not at all, so that processes may build at once.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from blockroll.config import cache_dir
from blockroll.errors import MissingDependency
from blockroll.kernels.processor import processor_features

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("layers.c")
_FLAGS = [
    *("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-shared", "-fPIC"),
]
_SECONDS = 120  # it takes about two
_WEIGHTS = ("q", "k", "v", "o", "gate", "up", "down")
_NORMS = ("norm_in", "norm_q", "norm_k", "norm_attention", "norm_mlp_in", "norm_mlp")


class Layer(ctypes.Structure):
    """Addresses of a layer's weights; None where it has none."""

    _fields_ = [
        (name, ctypes.c_void_p) for name in (*_WEIGHTS, *(f"{each}_bias" for each in _WEIGHTS), *_NORMS)
    ]


class LayerUpdates(ctypes.Structure):
    """Addresses of the low-rank updates of a layer's projections, those of the same rows as one."""

    _fields_ = [
        (f"{group}_{side}", ctypes.c_void_p)
        for group in ("qkv", "o", "gate_up", "down")
        for side in ("down", "up")
    ]


class UpdatedRows(ctypes.Structure):
    """Which rows of each text get updates, and space for the numbers of each of them."""

    _fields_ = [
        ("first", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("narrow_space", ctypes.c_void_p),
        ("wide_space", ctypes.c_void_p),
    ]


class Model(ctypes.Structure):
    """What all layers have in common."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "width", "heads", "key_heads", "head_width", "inner", "norm_adds_one", "activation"
            )
        ),
        ("epsilon", ctypes.c_float),
        ("norm_last", ctypes.c_void_p),
    ]  # fmt: skip


@cache
def layers_library(dtype: torch.dtype, processor: str = "native") -> ctypes.CDLL:
    """The compiled code for weights of a type, float32 or bfloat16; built if it is not there yet.

    `processor` is one that the compiler knows, and this machine can run code for.

    MissingDependency where this machine has no C compiler, or one that does not build it.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or not shutil.which(compiler):
        raise MissingDependency("there is no C compiler: install gcc or clang, or set CC to the path of one")
    command = [compiler, *_FLAGS, f"-march={processor}", f"-DNUMBER_BF16={int(dtype == torch.bfloat16)}"]
    sources = [each.read_text(encoding="utf-8") for each in sorted(SOURCE.parent.glob("*.[ch]"))]
    told = [*command, _output([compiler, "--version"]), *sources]
    told.append(processor_features())  # what `-march=native` goes by
    name = hashlib.sha256("\n".join(told).encode()).hexdigest()[:24]
    path = cache_dir() / "kernels" / f"layers-{name}.so"
    try:
        if not path.is_file():
            _build(command, path)
        return _declared(ctypes.CDLL(str(path)))
    except OSError as error:
        raise MissingDependency(
            f"compiled code cannot be kept in {path.parent} and loaded from there: {error}; set "
            "BLOCKROLL_CACHE to a folder in which it can"
        ) from error


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of what its functions take."""
    number, real, at, threads = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_int
    between, attend, product = library.between_attentions, library.attend, library.product_of_rows
    between.argtypes = [*[at] * 8, *[number] * 2, *[at] * 8, threads]
    attend.argtypes = [*[at] * 4, *[number] * 5, at, *[number] * 2, *[real] * 2, *[at] * 2, threads]
    product.argtypes = [*[at] * 2, number, at, *[number] * 2, at, threads]
    between.restype = attend.restype = product.restype = None
    return library


def _build(command: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        _output([*command, str(SOURCE), "-o", str(made), "-lm"])
        os.replace(made, path)
    logger.info("built %s", path)


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingDependency(f"the C compiler {command[0]!r} cannot be run: {error}") from error
    if done.returncode:
        raise MissingDependency(
            f"the C compiler {command[0]!r} does not build {SOURCE.name}: {done.stderr.strip()[-500:]}; "
            "set CC to another one"
        )
    return done.stdout
