"""What the tests themselves keep to."""

import ast
from pathlib import Path

TESTS = Path(__file__).parents[1]


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
