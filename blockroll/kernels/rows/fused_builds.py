"""What is the same of every kernel of rows that ships: types of arguments by name, and types of logits."""

from typing import Any

from blockroll.kernels.builds import Build

LOGITS = ("fp32", "bf16", "fp64")

_POINTERS = {
    "*i64": "AT QAT DRAFTED_AT SEEDS WORDS DRAFTS NUM_DRAFTS TOKENS COMMITTED",
    "*i32": "LAST QLAST FAULT READ_FAULT RANK DRAWS PLACED",
    "*i1": "CERTAIN IS_DRAFT",
    "*fp64": "TEMPERATURE QTEMPERATURE LIMITS WEIGHT SUM ROW_MASS KEPT BELOW FACTOR QFACTOR MASS LEFT "
    "GOALS BLOCKS UNIFORMS PROBS FIGURES JUDGED LOGPROBS",
}
_TYPES = {name: kind for kind, names in _POINTERS.items() for name in names.split()}


def read_as(logits: str) -> str:
    """The type that logits are read as."""
    return "fp64" if logits == "fp64" else "fp32"


def of_logits(logits: str) -> dict[str, str]:
    """Types that go by those of the logits."""
    edge = "*i64" if logits == "fp64" else "*i32"
    rows = dict.fromkeys(("X", "QX", "DRAFTED", "OUT"), f"*{logits}")
    tops = {name: f"*{read_as(logits)}" for name in ("TOP", "TOPS", "READ_TOP", "ROW_TOP", "QTOP")}
    return rows | tops | {"EDGE": edge, "QEDGE": edge, "KEY": edge}


def build(kernel: Any, label: str, logits: str, options: dict[str, Any]) -> Build:
    """A kernel for such logits, with what it is launched with."""
    constants = {name: value for name, value in options.items() if name not in ("num_warps", "num_stages")}
    known = _TYPES | of_logits(logits) | dict.fromkeys(constants, "constexpr")
    types = {name: known.get(name, "i32") for name in kernel.arg_names}
    aligned = frozenset(name for name, kind in types.items() if kind.startswith("*"))
    return Build(
        label=label,
        kernel=kernel,
        types=types,
        constants=constants,
        num_warps=options["num_warps"],
        aligned=aligned,
    )
