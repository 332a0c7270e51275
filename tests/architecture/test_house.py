"""What every file of the repository keeps to."""

import ast
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

TESTS = Path(__file__).parents[1]
FOLDERS = ("blockroll", "benchmarks", "examples", "scripts", "tests")
MOST_LINES = 400


def test_only_the_experiments_own_tests_import_benchmarks():
    importing = {
        str(path.relative_to(TESTS))
        for path in TESTS.rglob("*.py")
        for name in imported(path)
        if name.split(".")[0] == "benchmarks"
    }
    assert {name for name in importing if not name.startswith("benchmarks/")} == set()


def imported(path):
    """Dotted names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_no_python_file_is_over_four_hundred_lines():
    lengths = {
        str(path.relative_to(TESTS.parent)): len(path.read_text().splitlines())
        for folder in FOLDERS
        for path in (TESTS.parent / folder).rglob("*.py")
    }
    long = {name: length for name, length in lengths.items() if length > MOST_LINES}
    assert long == {}, f"split these by subject: {long}"


def test_what_the_package_reads_beside_its_code_goes_into_the_wheel():
    package = TESTS.parent / "blockroll"
    others = [path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert len(others) > 5
    assert [str(path) for path in others if not is_shipped(str(path.relative_to(package)))] == []
    assert not is_shipped("rl_loops/watch/other.json")


def is_shipped(name):
    setuptools = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    return any(fnmatchcase(name, pattern) for pattern in setuptools["package-data"]["blockroll"])
