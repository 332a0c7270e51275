"""What `import blockroll` promises: a change here is a change for every user."""

import ast
from pathlib import Path

import pytest

import blockroll

PUBLIC = [
    "AlignmentConfig",
    "ConvertConfig",
    "DraftConfig",
    "DraftTrainer",
    "Engine",
    "HFPolicy",
    "JsonSchema",
    "Law",
    "Plan",
    "PolicyConfig",
    "Regex",
    "Request",
    "Rollout",
    "RolloutConfig",
    "RolloutPool",
    "RunConfig",
    "Sampling",
    "TrainConfig",
    "__version__",
    "check_policy",
    "convert",
    "load_config",
    "train",
]


def test_the_public_names_are_exactly_these_and_sorted():
    assert blockroll.__all__ == PUBLIC
    assert sorted(PUBLIC) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_resolves_and_is_listed(name):
    assert getattr(blockroll, name) is not None
    assert name in dir(blockroll)


def test_type_checkers_see_every_name_that_is_imported_on_first_use():
    tree = ast.parse(Path(blockroll.__file__).read_text())
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("blockroll.")
        for alias in node.names
    }
    assert seen == blockroll._MODULES
    assert {*seen, "__version__"} == set(PUBLIC)


def test_a_name_that_is_not_public_is_refused_with_the_list_of_those_that_are():
    with pytest.raises(AttributeError, match=r"'Enigne'; public are AlignmentConfig, ConvertConfig"):
        _ = blockroll.Enigne
