"""Imports point down, and each third-party package is imported where it belongs; inside functions too."""

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "blockroll"

# Lower rows first. A unit imports only from lower rows; units of one row do not import each other.
ROWS = (
    ("errors",),
    ("types",),
    ("config",),
    ("kernels",),
    ("samplers", "policies"),
    ("rollout",),
    ("bench", "policy_check"),
    ("rl_loops",),
    ("cli",),
    ("__main__",),
)
RANKS = {unit: rank for rank, units in enumerate(ROWS) for unit in units}
# The same inside a unit: what watches or chooses for an engine stands above it, and pools above all of them.
FLOORS = {"rollout": (("engine",), ("drafters", "planning", "audit", "calibration"), ("pool", "running"))}

# Modules that may import a package; `*` also matches dots.
HOMES = {
    "accelerate": ("rl_loops.trl.*",),
    "gymnasium": ("rl_loops.envs*",),
    "huggingface_hub": ("policies.loading",),
    "llguidance": ("samplers.constraints",),
    "matplotlib": ("rl_loops.figures", "rl_loops.watch.figures"),
    "prometheus_client": ("rl_loops.watch.prometheus",),
    "pydantic": ("config.*",),
    "pydantic_core": ("config.*",),
    "pyarrow": ("rollout.audit.*",),
    "ray": ("rollout.pool.ray_*", "rollout.pool.weight_sync.*"),
    "reasoning_gym": ("rl_loops.envs*",),
    "transformers": ("policies.*", "bench.reference", "rl_loops.trl.*"),
    "triton": ("kernels.*.fused*",),
    "peft": ("rl_loops.trl.weights",),
    "trl": ("rl_loops.trl.*",),
    "vllm": ("bench.peer_worker",),
    "typer": ("cli", "cli.*"),
    "wandb": ("rl_loops.tracking",),
    "xxhash": ("rollout.pool.weight_sync.*",),
}
TORCH_FREE = ("config*", "errors")


def violations(module: str, source: str) -> list[str]:
    """One sentence per broken rule; `module` is dotted below `blockroll`, empty for the root.

    The root is exempt from the ranks: it maps names to modules.
    """
    tree = ast.parse(source)
    relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    sentences = [f"`{module}` must not import relatively (line {node.lineno})" for node in relative]
    for name in imported_names(tree):
        package, _, below = name.partition(".")
        if package == "blockroll":
            sentences += broken_rank(module.partition(".")[0], below.partition(".")[0])
            sentences += broken_floor(module.split("."), below.split("."))
        elif package == "torch" and any(fnmatchcase(module, free) for free in TORCH_FREE):
            sentences.append(f"`{module}` must not import `torch`")
        elif package in HOMES and not any(fnmatchcase(module, home) for home in HOMES[package]):
            sentences.append(f"`{module}` must not import `{package}`: it belongs in {HOMES[package]}")
    return sentences


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all that is imported, at any depth; `import_module("x")` and `blockroll.x` count."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(module="blockroll", names=aliases, level=0):
                yield from (f"blockroll.{alias.name}" for alias in aliases)
            case ast.ImportFrom(module=str(name), level=0):
                yield name
            case ast.Attribute(value=ast.Name(id="blockroll"), attr=name):
                yield f"blockroll.{name}"
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def broken_rank(importer: str, imported: str) -> list[str]:
    if importer in ("", imported) or not imported or imported.startswith("__"):
        return []
    if importer not in RANKS:
        return [f"`{importer}` has no row: give it one in {Path(__file__).name}"]
    if imported not in RANKS:
        return [f"`{importer}` must not import `{imported}` from the root: name a module"]
    if RANKS[imported] >= RANKS[importer]:
        return [f"`{importer}` must not import `{imported}`"]
    return []


def broken_floor(importer: list[str], imported: list[str]) -> list[str]:
    unit = importer[0]
    if unit not in FLOORS or imported[0] != unit or min(len(importer), len(imported)) < 2:
        return []
    if importer[1] == imported[1]:
        return []
    floors = {part: floor for floor, parts in enumerate(FLOORS[unit]) for part in parts}
    for part in (importer[1], imported[1]):
        if part not in floors:
            return [f"`{unit}.{part}` has no floor: give it one in {Path(__file__).name}"]
    if floors[imported[1]] >= floors[importer[1]]:
        return [f"`{unit}.{importer[1]}` must not import `{unit}.{imported[1]}`"]
    return []


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_import_points_down_and_stays_where_it_belongs():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    assert [sentence for path in files for sentence in violations(module_name(path), path.read_text())] == []


def test_every_unit_on_disk_has_a_row():
    units = {module_name(path).partition(".")[0] for path in PACKAGE.rglob("*.py")} - {""}
    assert units <= set(RANKS)


def test_the_page_on_architecture_names_the_same_floors():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    sentence = page[page.index("holds the floors:") : page.index("Rooms of one floor")]
    floors = [set(re.findall(r"`(\w+)`", floor)) for floor in sentence.split("→")]
    assert floors == [set(units) for units in reversed(ROWS) if units != ("__main__",)]


@pytest.mark.parametrize(
    ("module", "source", "sentence"),
    [
        (
            "samplers.laws",
            "from blockroll.rollout.engine.engine import Engine",
            "`samplers` must not import `rollout`",
        ),
        (
            "samplers.laws",
            "def f():\n    import blockroll.rollout",
            "`samplers` must not import `rollout`",
        ),
        ("samplers", "from blockroll import rollout", "`samplers` must not import `rollout`"),
        ("samplers", "import_module('blockroll.rollout')", "`samplers` must not import `rollout`"),
        ("samplers", "importlib.import_module('blockroll.rollout')", "`samplers` must not import `rollout`"),
        ("samplers", "from blockroll.policies.hf import HFPolicy", "`samplers` must not import `policies`"),
        ("policies.hf", "import blockroll.samplers", "`policies` must not import `samplers`"),
        ("types", "from blockroll.config import RunConfig", "`types` must not import `config`"),
        ("errors", "from blockroll.types import Law", "`errors` must not import `types`"),
        ("rollout.pool", "from blockroll.cli import app", "`rollout` must not import `cli`"),
        ("rollout.pool", "from blockroll import Engine", "`rollout` must not import `Engine` from the root"),
        (
            "rollout.pool",
            "import blockroll\nblockroll.Engine",
            "`rollout` must not import `Engine` from the root",
        ),
        ("novel", "from blockroll.types import Law", "`novel` has no row"),
        (
            "rollout.engine.engine",
            "from blockroll.rollout.audit.writer import AuditWriter",
            "`rollout.engine` must not import `rollout.audit`",
        ),
        (
            "rollout.audit.check",
            "from blockroll.rollout.planning.planner import Planner",
            "`rollout.audit` must not import `rollout.planning`",
        ),
        ("rollout.novel", "from blockroll.rollout.engine import cache", "`rollout.novel` has no floor"),
        ("rollout.pool", "from .engine import Engine", "`rollout.pool` must not import relatively (line 1)"),
        ("rollout.pool", "from . import engine", "`rollout.pool` must not import relatively (line 1)"),
        ("config.options", "import torch", "`config.options` must not import `torch`"),
        ("config", "if TYPE_CHECKING:\n    from torch import Tensor", "`config` must not import `torch`"),
        ("errors", "import torch.cuda", "`errors` must not import `torch`"),
        ("rollout.pool", "import ray", "`rollout.pool` must not import `ray`"),
        (
            "rollout.engine",
            "from transformers import Cache",
            "`rollout.engine` must not import `transformers`",
        ),
        ("rl_loops.algorithms.grpo", "import trl", "`rl_loops.algorithms.grpo` must not import `trl`"),
        ("rl_loops.loop", "def f():\n    import wandb", "`rl_loops.loop` must not import `wandb`"),
        (
            "rl_loops.loop",
            "import prometheus_client",
            "`rl_loops.loop` must not import `prometheus_client`",
        ),
        ("rl_loops.tasks", "import gymnasium as gym", "`rl_loops.tasks` must not import `gymnasium`"),
        ("kernels.block_verify", "import triton", "`kernels.block_verify` must not import `triton`"),
        ("rl_loops.loop", "import typer", "`rl_loops.loop` must not import `typer`"),
        ("rl_loops.loop", "import matplotlib.pyplot", "`rl_loops.loop` must not import `matplotlib`"),
        ("", "import ray", "`` must not import `ray`"),
    ],
)
def test_a_planted_import_is_reported_by_name(module, source, sentence):
    (reported,) = violations(module, source)
    assert reported.startswith(sentence)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cli", "import typer\nimport blockroll\nblockroll.__version__\nimport blockroll.rl_loops.loop"),
        ("rollout.pool.ray_replica", "import ray\nfrom blockroll.rollout.pool.pool import RolloutPool"),
        ("rollout.pool.weight_sync.object_store", "import ray"),
        ("policies.hf", "import torch\nfrom transformers import Cache"),
        ("kernels.block_verify.fused", "import triton.language as tl"),
        ("rl_loops.envs_gym", "import gymnasium"),
        ("types", "import torch\nfrom blockroll.errors import InvalidInput"),
        ("", "import_module('blockroll.cli')"),
    ],
)
def test_an_import_that_belongs_passes(module, source):
    assert violations(module, source) == []
