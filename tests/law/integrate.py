"""The public integration under the names that the law tests use: a `Toy` is `Tables`."""

from blockroll.samplers.check.integrate import (
    Step,
    _boundaries,
    _product,
    _split,
    committed_law,
    integrate_step,
    max_difference,
    target_law,
)
from blockroll.samplers.check.tables import PRODUCTION, Sampler, Tokens, tempered
from blockroll.samplers.check.tables import Tables as Toy

__all__ = [
    "PRODUCTION",
    "Sampler",
    "Step",
    "Tokens",
    "Toy",
    "_boundaries",
    "_product",
    "_split",
    "committed_law",
    "integrate_step",
    "max_difference",
    "target_law",
    "tempered",
]
