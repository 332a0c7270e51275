"""What is built once and kept: a library that lies damaged in the cache is built again."""

import subprocess
import sys

import pytest

from blockroll.errors import MissingDependency
from blockroll.kernels.compiler import built

ASK = """
import sys
from pathlib import Path
from blockroll.kernels.compiler import built
print(built(Path(sys.argv[1])).seven())
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKROLL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "seven.c"
    path.write_text("int seven(void) { return 7; }\n")
    try:
        built(path)
    except MissingDependency as missing:
        pytest.skip(str(missing))
    return path


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:100], lambda data: data[: len(data) // 4], flipped],
    ids=["empty", "its first bytes", "a quarter", "a bit is another"],
)
def test_a_damaged_library_is_built_again(source, tmp_path, damage):
    [library] = (tmp_path / "cache" / "kernels").iterdir()
    whole = library.read_bytes()
    library.unlink()  # it is in use here
    library.write_bytes(damage(whole))
    # In a process of its own: a library of which a part is missing ends the one that loads it.
    ask = subprocess.run(
        [sys.executable, "-c", ASK, str(source)], capture_output=True, text=True, check=False
    )
    assert (ask.returncode, ask.stdout.strip()) == (0, "7"), ask.stderr
    assert library.read_bytes() != damage(whole)


def test_a_whole_library_is_not_built_again(source, tmp_path):
    [library] = (tmp_path / "cache" / "kernels").iterdir()
    before = library.stat()
    assert built(source).seven() == 7
    after = library.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
