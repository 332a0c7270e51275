"""Keys and values of one layer in pages: what attention reads and `cache_write` writes.

Shapes: N pages, G key heads, Z rows of a page, D head width, B requests, T pages of the longest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from blockroll.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """Row t of a request lies in page `table_BT[b, t // Z]`, at t % Z. Page 0 is nobody's, and zeros."""

    keys_NGZD: Tensor
    values_NGZD: Tensor
    table_BT: Tensor  # int64, the pages of each request in order; behind its rows any page may stand

    def __post_init__(self) -> None:
        keys, values, table = self.keys_NGZD, self.values_NGZD, self.table_BT
        if keys.dim() != 4 or keys.shape != values.shape or keys.dtype != values.dtype:
            raise InvalidInput(
                f"keys are {keys.dtype} {tuple(keys.shape)} and values {values.dtype} {tuple(values.shape)}: "
                "give both as (N pages, G heads, Z rows, D) in one type"
            )
        if self.size < 1 or self.size & (self.size - 1):
            raise InvalidInput(f"a page has {self.size} rows: give a power of two")
        if table.dim() != 2 or table.dtype != torch.int64:
            raise InvalidInput(
                f"the table of pages is {table.dtype} {tuple(table.shape)}: give int64 (B requests, T pages)"
            )

    @property
    def size(self) -> int:
        """Rows of a page, a power of two."""
        return self.keys_NGZD.shape[2]

    @property
    def num_heads(self) -> int:
        """Key heads."""
        return self.keys_NGZD.shape[1]
