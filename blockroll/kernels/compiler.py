"""Builds a C source of this package with the machine's own compiler, once, and loads it.

What is built is kept in the cache folder under a name that says what it was built of: source, flags, compiler
and processor. It is put there whole or not at all, so that processes may build at once; behind it stands its
checksum, since a part of a library that is loaded ends the process. One that is damaged is built again.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from blockroll.config import cache_dir
from blockroll.errors import MissingDependency
from blockroll.kernels.processor import processor_features

logger = logging.getLogger(__name__)

_FLAGS = [
    *("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-shared", "-fPIC"),
]
_SECONDS = 120  # it takes about two
_CHECKSUM_BYTES = 32


def built(source: Path, defines: Sequence[str] = (), processor: str = "native") -> ctypes.CDLL:
    """The library that a C file makes, built if it is not there yet.

    `processor` is one that the compiler knows, and this machine can run code for.

    MissingDependency where this machine has no C compiler, or one that does not build it.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or not shutil.which(compiler):
        raise MissingDependency("there is no C compiler: install gcc or clang, or set CC to the path of one")
    command = [compiler, *_FLAGS, f"-march={processor}", *defines]
    sources = [each.read_text(encoding="utf-8") for each in sorted(source.parent.glob("*.[ch]"))]
    told = [*command, _output([compiler, "--version"], source), *sources]
    told.append(processor_features())  # what `-march=native` goes by
    name = hashlib.sha256("\n".join(told).encode()).hexdigest()[:24]
    path = cache_dir() / "kernels" / f"{source.stem}-{name}.so"
    try:
        if not _is_whole(path):
            _build(command, source, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise MissingDependency(
            f"compiled code cannot be kept in {path.parent} and loaded from there: {error}; set "
            "BLOCKROLL_CACHE to a folder in which it can"
        ) from error


def _build(command: list[str], source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        _output([*command, str(source), "-o", str(made), "-lm"], source)
        library = made.read_bytes()
        made.write_bytes(library + _checksum(library))  # what reads a library ignores what stands behind it
        os.replace(made, path)
    logger.info("built %s", path)


def _is_whole(path: Path) -> bool:
    """Whether what was built lies there as it was written."""
    if not path.is_file():
        return False
    kept = path.read_bytes()
    return _checksum(kept[:-_CHECKSUM_BYTES]) == kept[-_CHECKSUM_BYTES:]


def _checksum(library: bytes) -> bytes:
    return hashlib.blake2b(library, digest_size=_CHECKSUM_BYTES).digest()


def _output(command: list[str], source: Path) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingDependency(f"the C compiler {command[0]!r} cannot be run: {error}") from error
    if done.returncode:
        raise MissingDependency(
            f"the C compiler {command[0]!r} does not build {source.name}: {done.stderr.strip()[-500:]}; "
            "set CC to another one"
        )
    return done.stdout
