"""Within `rollout`: modules do not import each other in a circle, and makers alone load policies."""

import ast
import graphlib
from pathlib import Path

import pytest

from tests.architecture.test_import_layers import PACKAGE, imported_names, module_name

ROLLOUT = PACKAGE / "rollout"
# Who may import `HFPolicy` at run time: makers, and what recomputes a record with a policy that it is given.
LOADERS = {"rollout.pool.makers", "rollout.audit.recompute"}
# A constructor on the class that users know; nothing else asks upwards, not even within a function.
UPWARDS = {("rollout.pool.pool", "rollout.pool.makers")}


def at_run_time(tree: ast.Module) -> ast.Module:
    """The module without what only type checkers read."""
    body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    return ast.Module(body=body, type_ignores=[])


def imports_of(source: str) -> set[str]:
    names = imported_names(at_run_time(ast.parse(source)))
    return {name.removeprefix("blockroll.") for name in names if name.startswith("blockroll.")}


def circle(sources: dict[str, str]) -> list[str]:
    """Modules that import each other, if any do; `blockroll.a.b` is the module `a.b`."""
    graph = {
        module: {name for name in imports_of(source) if name in sources and (module, name) not in UPWARDS}
        for module, source in sources.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def on_disk() -> dict[str, str]:
    return {module_name(path): path.read_text() for path in sorted(Path(ROLLOUT).rglob("*.py"))}


def test_modules_of_rollout_do_not_import_each_other_in_a_circle():
    assert circle(on_disk()) == []


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("rollout.pool.router", "rollout.pool.pool"),
        ("rollout.pool.replica", "rollout.pool.pool"),
        ("rollout.pool.ray_replica", "rollout.pool.makers"),
    ],
)
def test_a_planted_circle_is_named(importer, imported):
    sources = on_disk()
    sources[importer] += f"\ndef f():\n    import blockroll.{imported}\n"
    assert {importer, imported} <= set(circle(sources))


def test_only_makers_load_policies():
    loaders = {
        module
        for module, source in on_disk().items()
        if {"policies.hf", "policies.loading"} & imports_of(source)
    }
    assert "rollout.pool.makers" in loaders
    assert loaders <= LOADERS
