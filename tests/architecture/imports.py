"""The direction of imports as a rule over source text: who may import whom, inside functions too.

Owns the ranks and the homes of third-party packages; knows nothing of the files on disk.
"""

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase

# Later rows may import earlier ones; units of one row do not import each other.
ROWS = (
    ("errors",),
    ("types", "config"),
    ("kernels",),
    ("samplers", "policies"),
    ("rollout",),
    ("rl_loops",),
    ("cli",),
)
RANKS = {unit: rank for rank, units in enumerate(ROWS) for unit in units}

# Where a package may be imported, as patterns over dotted module names; `*` crosses dots.
HOMES = {
    "gymnasium": ("blockroll.rl_loops.envs", "blockroll.rl_loops.envs_*", "blockroll.rl_loops.envs.*"),
    "matplotlib": ("blockroll.rl_loops.report", "blockroll.rl_loops.figures"),
    "ray": ("blockroll.rollout.ray_pool", "blockroll.rollout.weight_sync", "blockroll.rollout.weight_sync.*"),
    "transformers": ("blockroll.policies", "blockroll.policies.*"),
    "triton": ("blockroll.kernels.*.fused",),
    "trl": ("blockroll.rl_loops.trl",),
    "typer": ("blockroll.cli", "blockroll.cli.*"),
    "wandb": ("blockroll.rl_loops.tracking",),
}
TORCH_FREE = ("blockroll.config", "blockroll.errors")


def violations(module: str, source: str) -> list[str]:
    """One sentence per import of `module` (dotted name) that breaks a rule. The root `__init__` is exempt
    from the ranks: it maps names to modules."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.append(f"`{module}` must not import relatively (line {node.lineno})")
        for name in _imported(node):
            package, _, rest = name.partition(".")
            if package == "blockroll":
                found += _against_ranks(module, rest.partition(".")[0])
            elif package in HOMES and not any(fnmatchcase(module, home) for home in HOMES[package]):
                found.append(f"`{module}` must not import `{package}`: only {_listed(HOMES[package])} may")
            elif package == "torch" and module in TORCH_FREE and not _is_for_typing_only(node, source):
                found.append(f"`{module}` must not import `torch`")
    return found


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level and node.module == "blockroll":
        yield from (f"blockroll.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
        yield node.module or ""
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            yield node.args[0].value
