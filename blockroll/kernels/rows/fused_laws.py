"""Rows of logits are read once: the largest logit and the sum of weights of each tile, and then of each row.

Shapes: B requests, L rows of each, N rows of a program, W ids of a tile, T tiles.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockroll.kernels.builds import Build
from blockroll.kernels.rows.fused_builds import LOGITS, build
from blockroll.kernels.rows.fused_cut import cut
from blockroll.kernels.rows.fused_reading import logits_of, scale_of, whole_key
from blockroll.kernels.rows.fused_sources import Source
from blockroll.kernels.rows.tiles import SHAPE, Read, Shape, Tiled, empty_tiled, shape_of

_INTEGERS = ["num_cells", "num_rows", "vocab", "num_tiles", "is_dense"]


@triton.jit(do_not_specialize=_INTEGERS)
def read_tiles(
    X, AT, TEMPERATURE, TOP, SUM, FAULT, num_cells, num_rows, vocab, num_tiles, is_dense, N: tl.constexpr,
    W: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Of a tile the largest logit, the sum of weights, and whether any is NaN or infinite."""
    cell_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    at_N = tl.load(AT + cell_N, mask=cell_N < num_cells, other=-1)
    if tl.max(at_N, 0) >= 0:
        tile = tl.program_id(1)
        ids_NW = (tile * W + tl.arange(0, W))[None, :]
        is_on_N = at_N >= 0
        is_on_NW = is_on_N[:, None] & (ids_NW < vocab)
        if ALIGNED:
            at_N = tl.multiple_of(at_N, [16])
        y_NW = logits_of(X, at_N, ids_NW, is_on_NW)
        request_N = tl.where(is_on_N, cell_N // num_rows, 0).to(tl.int32)
        scale_N = scale_of(TEMPERATURE, request_N, y_NW.dtype)
        is_bad_NW = (y_NW != y_NW) | (y_NW == float("inf"))
        y_NW = tl.where(is_bad_NW, float("-inf"), y_NW)
        # A tile that is empty has a finite top too, so that gaps to it are no NaN.
        top_N = tl.maximum(tl.max(y_NW, 1), -3.4028234663852886e38)
        w_NW = tl.exp(-((top_N[:, None] - y_NW) * scale_N[:, None]))
        if y_NW.dtype == tl.float64:
            w_NW = tl.where(is_dense != 0, y_NW, w_NW)
        at_N = cell_N * num_tiles + tile
        tl.store(TOP + at_N, top_N, mask=is_on_N)
        tl.store(SUM + at_N, tl.sum(tl.where(is_on_NW, w_NW, 0.0).to(tl.float64), 1), mask=is_on_N)
        tl.store(FAULT + at_N, tl.max(is_bad_NW.to(tl.int32), 1), mask=is_on_N)


@triton.jit
def rows_of(
    AT, TEMPERATURE, TOP, SUM, FAULT, num_cells, num_rows, vocab, num_tiles, is_dense,
    N: tl.constexpr, W: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Of rows: where they are, tops and masses of their tiles, mass and top, and what is wrong with them."""
    cell_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    at_N = tl.load(AT + cell_N, mask=cell_N < num_cells, other=-1)
    is_on_N = at_N >= 0
    tile_NT = tl.arange(0, T)[None, :]
    at_NT = cell_N[:, None] * num_tiles + tile_NT
    is_on_NT = is_on_N[:, None] & (tile_NT < num_tiles)
    tops_NT = tl.load(TOP + at_NT, mask=is_on_NT, other=-3.4028234663852886e38)
    sum_NT = tl.load(SUM + at_NT, mask=is_on_NT, other=0.0)
    fault_NT = tl.load(FAULT + at_NT, mask=is_on_NT, other=0)
    top_N = tl.max(tops_NT, 1)
    request_N = (tl.where(is_on_N, cell_N, 0) // num_rows).to(tl.int32)
    scale_N = scale_of(TEMPERATURE, request_N, tops_NT.dtype)
    gap_NT = (top_N[:, None] - tops_NT).to(tl.float64)
    factor_NT = tl.where(is_dense != 0, 1.0, tl.exp(-(gap_NT * scale_N[:, None].to(tl.float64))))
    mass_N = tl.sum(sum_NT * factor_NT, 1)
    fault_N = tl.max(fault_NT, 1)
    fault_N = tl.where((fault_N == 0) & ((mass_N > 0) == 0), 2, fault_N)
    return cell_N, request_N, is_on_N, is_on_NT, at_NT, tops_NT, sum_NT, factor_NT, top_N, mass_N, fault_N


@triton.jit(do_not_specialize=_INTEGERS)
def row_laws(
    AT, TEMPERATURE, TOP, SUM, READ_FAULT, ROW_TOP, ROW_MASS, TOPS, FACTOR, MASS, EDGE, LAST, FAULT,
    num_cells, num_rows, vocab, num_tiles, is_dense, N: tl.constexpr, W: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """`Tiled` of rows that nothing is cut from; a row that holds no law gets the even one."""
    cell_N, _, is_on_N, is_on_NT, at_NT, tops_NT, sum_NT, factor_NT, top_N, mass_N, fault_N = rows_of(
        AT, TEMPERATURE, TOP, SUM, READ_FAULT, num_cells, num_rows, vocab, num_tiles, is_dense, N, W, T
    )
    tl.store(ROW_TOP + cell_N, top_N, mask=is_on_N)
    tl.store(ROW_MASS + cell_N, mass_N, mask=is_on_N)
    is_even_NT = (fault_N > 0)[:, None]
    mass_N = tl.where((fault_N > 0) | (is_dense != 0), 1.0, mass_N)
    factor_NT = tl.where(is_even_NT, 1.0 / vocab.to(tl.float64), factor_NT / mass_N[:, None])
    held_NT = tl.minimum(vocab - tl.arange(0, T)[None, :] * W, W).to(tl.float64)
    tl.store(TOPS + at_NT, tl.where(is_even_NT, float("inf"), tops_NT), mask=is_on_NT)
    tl.store(FACTOR + at_NT, factor_NT, mask=is_on_NT)
    tl.store(MASS + at_NT, tl.where(is_even_NT, held_NT, sum_NT) * factor_NT, mask=is_on_NT)
    tl.store(EDGE + cell_N, whole_key([N], EDGE.dtype.element_ty), mask=is_on_N)
    tl.store(LAST + cell_N, tl.full([N], 0x7FFFFFFF, tl.int32), mask=is_on_N)
    tl.store(FAULT + cell_N, fault_N, mask=is_on_N)


@triton.jit(do_not_specialize=[*_INTEGERS, "out_request", "out_row"])
def row_logprobs(
    X, AT, TEMPERATURE, TOKENS, TOP, SUM, READ_FAULT, LOGPROBS, num_cells, num_rows, vocab, num_tiles,
    out_request, out_row, N: tl.constexpr, W: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Log-probability of a token of each row, also where its probability is too small for float64.

    Tokens lie where log-probabilities go: strides and an offset say where, in a wider rectangle.
    """
    cell_N, request_N, is_on_N, _, _, _, _, _, top_N, mass_N, fault_N = rows_of(
        AT, TEMPERATURE, TOP, SUM, READ_FAULT, num_cells, num_rows, vocab, num_tiles, 0, N, W, T
    )
    out_N = request_N * out_request + (cell_N % num_rows).to(tl.int32) + out_row
    token_N = tl.load(TOKENS + out_N, mask=is_on_N, other=0)
    at_N = tl.load(AT + cell_N, mask=is_on_N, other=0)
    y_N = tl.load(X + at_N + token_N, mask=is_on_N, other=0.0)
    if X.dtype.element_ty != tl.float64:
        y_N = y_N.to(tl.float32)
    gap_N = top_N.to(tl.float64) - y_N.to(tl.float64)
    logprob_N = -gap_N * scale_of(TEMPERATURE, request_N, tl.float64) - tl.log(mass_N)
    even_N = -tl.log(tl.zeros([N], tl.float64) + vocab)
    tl.store(LOGPROBS + out_N, tl.where(fault_N > 0, even_N, logprob_N), mask=is_on_N)


def read(source: Source) -> Read:
    """Once through the rows that are asked for."""
    size, num_rows, vocab_size = source.shape
    shape = shape_of(vocab_size)
    num_tiles, device = shape.num_tiles(vocab_size), source.logits.device
    top_dtype = torch.float64 if source.logits.dtype == torch.float64 else torch.float32
    found = Read(
        shape,
        num_tiles,
        *(
            torch.empty((size, num_rows, num_tiles), dtype=dtype, device=device)
            for dtype in (top_dtype, torch.float64, torch.int32)
        ),
        *(torch.empty((size, num_rows), dtype=dtype, device=device) for dtype in (top_dtype, torch.float64)),
    )
    num_cells = size * num_rows
    if num_cells:
        read_tiles[triton.cdiv(num_cells, shape.rows), num_tiles](
            *(source.logits, source.at_BL, source.temperature_B, *found.tensors),
            *(num_cells, num_rows, vocab_size, num_tiles, int(source.is_dense)),
            **options(shape, ALIGNED=source.is_aligned and shape.rows == 1),
        )
    return found


def tiled(source: Source) -> Tiled:
    """What is known of rows once they are read; mostly they are read once."""
    if source.tiled is not None:
        return source.tiled.contiguous()
    known = empty_tiled(source.shape, source.logits.dtype, source.logits.device)
    size, num_rows, vocab_size = source.shape
    if size * num_rows == 0:
        return known
    found = read(source)
    row_laws[(triton.cdiv(size * num_rows, found.shape.rows),)](
        *(source.at_BL, source.temperature_B, *found.tensors),
        *(found.row_top_BL, found.row_mass_BL, *known.tensors),
        *(size * num_rows, num_rows, vocab_size, found.num_tiles, int(source.is_dense)),
        **options(found.shape, T=found.shape.most_tiles),
    )
    if source.has_greedy or source.cut is not None:
        cut(source, found, known)
    return known


def logprobs(source: Source, token_ids_BL: Tensor, out_BL: Tensor, first: int) -> None:
    """Of a token of each row that is asked for, into some columns of all; no temperature is 0."""
    size, num_rows, vocab_size = source.shape
    if size * num_rows == 0:
        return
    found = read(source)
    row_logprobs[(triton.cdiv(size * num_rows, found.shape.rows),)](
        *(source.logits, source.at_BL, source.temperature_B, token_ids_BL, *found.tensors, out_BL),
        *(size * num_rows, num_rows, vocab_size, found.num_tiles, out_BL.shape[1], first),
        **options(found.shape, T=found.shape.most_tiles),
    )


def options(shape: Shape, **constants: Any) -> dict[str, Any]:
    """What kernels of rows are launched with."""
    return {"N": shape.rows, "W": shape.width, "num_warps": 8, **constants}


def builds() -> Iterator[Build]:
    """Every way in which these kernels ship."""
    of_rows = options(SHAPE, T=SHAPE.most_tiles)
    for logits in LOGITS:
        for aligned in (False, True):
            label = f"read {logits}{' aligned' * aligned}"
            yield build(read_tiles, label, logits, options(SHAPE, ALIGNED=aligned))
        yield build(row_logprobs, f"logprobs {logits}", logits, of_rows)
        if logits != "bf16":
            yield build(row_laws, f"rows {logits}", logits, of_rows)
