"""How kernels are compiled to ship: what tests compile for GPUs that are not there."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """One way in which a kernel ships, all that a compiler is told of it.

    `types` are those of all arguments in order ("*bf16", "i32"); those of constants are "constexpr".
    """

    label: str
    kernel: Any  # a function under triton.jit
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    aligned: frozenset[str] = frozenset()  # arguments that 16 divides

    def __post_init__(self) -> None:
        unset = {name for name, kind in self.types.items() if kind == "constexpr"} ^ {*self.constants}
        assert not unset, f"{self.label}: {sorted(unset)} are constants without a value, or the reverse"
