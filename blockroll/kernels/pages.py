"""Keys and values of one layer in pages: what attention reads and `cache_write` writes.

Shapes: N pages, G key heads, Z rows of a page, D head width, B requests, T pages of the longest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from blockroll.errors import InvalidInput

# What Triton's kernels are cut for.
HEAD_WIDTHS = (32, 64, 128, 256)
PAGE_SIZES = (16, 32, 64, 128)
TYPES = (torch.float32, torch.bfloat16, torch.float16)


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

    def check_served(self) -> None:
        """InvalidInput where Triton's kernels have no configuration for these pages."""
        keys, values = self.keys_NGZD, self.values_NGZD
        problem = unserved(keys.shape[3], self.size, keys.dtype)
        if problem is not None:
            raise InvalidInput(f"{problem}: give pages of these, or set kernels to 'reference'")
        *outer, inner = keys.stride()
        if keys.stride() != values.stride() or inner != 1 or any(stride % 16 for stride in outer):
            raise InvalidInput(
                f"keys in pages have strides {keys.stride()} and values {values.stride()}: give both alike, "
                "with rows that are contiguous and begin at multiples of 16 numbers"
            )


def unserved(width: int, page_size: int, dtype: torch.dtype) -> str | None:
    """Why Triton's kernels have no configuration for such pages; None: they have."""
    if width in HEAD_WIDTHS and page_size in PAGE_SIZES and dtype in TYPES:
        return None
    return (
        f"pages have {page_size} rows of heads of width {width}, {dtype}; Triton's kernels serve "
        f"{PAGE_SIZES} rows, widths {HEAD_WIDTHS} and {', '.join(map(str, TYPES))}"
    )
