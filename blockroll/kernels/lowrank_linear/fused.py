"""`lowrank_linear` in Triton, in one launch: rows before the first are neither read nor written.

A program makes the narrow product of a block of rows and keeps it in registers, then adds its wide product to
some blocks of columns. With few rows columns are shared among many programs, which each make the narrow
product once more: it is small, and a second launch costs more.

Shapes: B texts, R rows of each, I and O numbers in and out, r rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockroll.kernels.builds import Build

PROGRAMS = 512  # enough for every core of a large GPU: more blocks of rows than that keep their columns
INTERPRETED = triton.knobs.runtime.interpret  # its products of 16-bit numbers are wrong: operands go up first


@dataclass(frozen=True, slots=True)
class Blocks:
    """What a program holds at once."""

    rows: int
    columns: int
    depth: int  # of the width
    rank: int
    num_warps: int
    num_stages: int

    @property
    def constants(self) -> dict[str, Any]:
        """What a kernel is compiled for, but for whether sizes are even."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth, "RANK": self.rank}


# By rank, as large as registers hold. A step of few rows waits for memory, and many loads under way help.
HALF = {
    16: Blocks(32, 128, 64, 16, num_warps=4, num_stages=4),
    32: Blocks(32, 128, 64, 32, num_warps=4, num_stages=4),
    64: Blocks(32, 64, 64, 64, num_warps=4, num_stages=4),
    128: Blocks(16, 32, 32, 128, num_warps=8, num_stages=3),
}
FLOAT = {
    16: Blocks(32, 64, 32, 16, num_warps=4, num_stages=4),
    32: Blocks(32, 64, 32, 32, num_warps=8, num_stages=4),
    64: Blocks(32, 32, 32, 64, num_warps=8, num_stages=4),
}
ODD = Blocks(32, 32, 32, 128, num_warps=8, num_stages=2)  # for other ranks, and sizes that are not even


@triton.jit(do_not_specialize=["num_rows", "rows_of_text", "first_row", "num_tiles"])
def add_update(
    base, x, down, up,
    num_rows, rows_of_text, first_row, width, out_width, rank, num_tiles, scale,
    base_text_stride, base_row_stride, x_text_stride, x_row_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, RANK: tl.constexpr,
    IS_EVEN: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """base += scale * up(down(x)), of row `first_row` + i of each text for i < `rows_of_text`."""
    # Outside, the last place inside is read and counts nowhere: that takes fewer registers than masks.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(row, num_rows - 1)
    text, place = (rows // rows_of_text).to(tl.int64), (first_row + rows % rows_of_text).to(tl.int64)
    depth, narrow = tl.arange(0, DEPTH), tl.arange(0, RANK)
    narrows = narrow if IS_EVEN else tl.minimum(narrow, rank - 1)
    x_row = x + text * x_text_stride + place * x_row_stride
    product = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(0, width, DEPTH):
        at = start + depth if IS_EVEN else tl.minimum(start + depth, width - 1)
        some_x = tl.load(x_row[:, None] + at[None, :])
        if not IS_EVEN:
            some_x = tl.where((start + depth < width)[None, :], some_x, 0.0)
        some_down = tl.load(down + narrows[None, :] * width + at[:, None]).to(x.dtype.element_ty)
        if UP:
            some_x, some_down = some_x.to(tl.float32), some_down.to(tl.float32)
        product = tl.dot(some_x, some_down, product, input_precision="ieee")
    if not IS_EVEN:
        product = tl.where((narrow < rank)[None, :], product, 0.0)
    narrowed = product.to(x.dtype.element_ty)
    base_row = base + text * base_text_stride + place * base_row_stride
    for tile in tl.range(num_tiles, num_stages=1):
        column = (tl.program_id(1) * num_tiles + tile) * COLUMNS + tl.arange(0, COLUMNS)
        columns = tl.minimum(column, out_width - 1)
        some_up = tl.load(up + columns[None, :] * rank + narrows[:, None]).to(x.dtype.element_ty)
        if UP:
            change = tl.dot(narrowed.to(tl.float32), some_up.to(tl.float32), input_precision="ieee")
        else:
            change = tl.dot(narrowed, some_up, input_precision="ieee")
        at = base_row[:, None] + column[None, :]
        is_inside = (row < num_rows)[:, None] & (column < out_width)[None, :]
        changed = tl.load(at, mask=is_inside, other=0.0).to(tl.float32) + scale * change
        tl.store(at, changed.to(base.dtype.element_ty), mask=is_inside)


def add_lowrank(
    base_BRO: Tensor, x_BRI: Tensor, down_rI: Tensor, up_Or: Tensor, first_row: int, scale: float
) -> Tensor:
    """base + scale * up(down(x)) on the rows from `first_row` on, in place; without gradients."""
    kind = x_BRI.device.type
    if torch.is_autocast_enabled(kind):
        x_BRI = x_BRI.to(torch.get_autocast_dtype(kind))
    size, rows, out_width = base_BRO.shape
    num_rows, rank, width = size * (rows - first_row), *down_rI.shape
    if num_rows == 0 or out_width == 0 or rank == 0:
        return base_BRO
    strides = (*base_BRO.stride()[:2], *x_BRI.stride()[:2])
    by_rank = FLOAT if x_BRI.dtype == torch.float32 else HALF
    is_even = rank in by_rank and width % 64 == 0 and all(each % 16 == 0 for each in (out_width, *strides))
    blocks = by_rank[rank] if is_even else ODD
    num_blocks, num_columns = triton.cdiv(num_rows, blocks.rows), triton.cdiv(out_width, blocks.columns)
    num_tiles = triton.cdiv(num_columns, max(1, PROGRAMS // num_blocks))
    add_update[(num_blocks, triton.cdiv(num_columns, num_tiles))](
        base_BRO,
        x_BRI,
        down_rI,
        up_Or,
        num_rows,
        rows - first_row,
        first_row,
        width,
        out_width,
        rank,
        num_tiles,
        scale,
        *strides,
        **blocks.constants,
        IS_EVEN=is_even,
        UP=INTERPRETED,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    return base_BRO


def builds() -> Iterator[Build]:
    """Every way in which this kernel ships: by type and rank, and for what is not even."""
    for kind in ("bf16", "fp16", "fp32"):
        for blocks in (*(FLOAT if kind == "fp32" else HALF).values(), ODD):
            is_even = blocks is not ODD
            types = dict.fromkeys(add_update.arg_names, "i32") | {"scale": "fp32"}
            types |= {"base": f"*{kind}", "x": f"*{kind}", "down": "*fp32", "up": "*fp32"}
            constants = blocks.constants | {"IS_EVEN": is_even, "UP": False}
            sizes = (
                {name for name in types if name.endswith(("width", "stride", "rank"))} if is_even else set()
            )
            yield Build(
                label=f"add_update {kind}, {f'rank {blocks.rank}' if is_even else 'odd sizes'}",
                kernel=add_update,
                types=types | dict.fromkeys(constants, "constexpr"),
                constants=constants,
                num_warps=blocks.num_warps,
                num_stages=blocks.num_stages,
                aligned=frozenset({"base", "x", "down", "up"} | sizes),
            )
