"""What top-k, top-p and min-p leave of rows, found without sorting: by thresholds, counts and masses.

Tokens stand in the order of their gap to the best logit, of equal ones the lowest id first. Top-k and top-p
each keep the first of them, so many or so much, and so does min-p: what stays of a row is said by one gap,
`edge`, and of the tokens at that gap by an id, `last`. The edge is found between two gaps, of which one is
too small and the other is not: each look at the row compares with two in between, and then moves both to
gaps that tokens have. A greedy row is one of which the best token stays, of equal ones the lowest id.

Shapes: B requests, N rows of a program, W ids of a tile, C ids of a part of it, T tiles.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockroll.kernels.builds import Build
from blockroll.kernels.rows.fused_builds import LOGITS, build
from blockroll.kernels.rows.fused_reading import gap_of, key_of, logits_of, probs_of, scale_of
from blockroll.kernels.rows.fused_sources import Source
from blockroll.kernels.rows.tiles import SHAPE, Read, Shape, Tiled
from blockroll.kernels.rows.truncation import Cut

_PART = 2048  # ids of a tile that a look holds at once
_INTEGERS = ["stage", "num_cells", "num_requests", "num_rows", "vocab", "num_tiles"]


@triton.jit
def between(low, high, share: tl.constexpr):
    """A key that lies between two others, by the gaps that they stand for."""
    low_gap = gap_of(tl.maximum(low, 0))
    key = key_of(low_gap + (gap_of(high) - low_gap) * share)
    return tl.maximum(low + 1, tl.minimum(key, high - 1))


@triton.jit
def weight_of(scaled):
    """Float32 of float64 gaps too: what stays is summed anew, in the type of its row."""
    return tl.exp(-scaled.to(tl.float32))


@triton.jit
def rank_of(left, weight):
    """How many tokens of this weight are the fewest that hold what is left: int32, one at least."""
    rank = tl.ceil(left / weight)
    rank = tl.where((rank - 1) * weight >= left, rank - 1, rank)
    return tl.maximum(tl.minimum(rank, 2147483647.0), 1.0).to(tl.int32)


@triton.jit(do_not_specialize=_INTEGERS)
def take_best(
    X, AT, TEMPERATURE, READ_TOP, ROW_TOP, TOPS, FACTOR, MASS, EDGE, LAST, FAULT, num_cells, num_rows, vocab,
    num_tiles, N: tl.constexpr, W: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """`Tiled` anew, of rows that are greedy."""
    cell_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    at_N = tl.load(AT + cell_N, mask=cell_N < num_cells, other=-1)
    temperature_N = tl.load(TEMPERATURE + cell_N // num_rows, mask=at_N >= 0, other=1.0)
    is_on_N = (temperature_N == 0) & (tl.load(FAULT + cell_N, mask=at_N >= 0, other=1) == 0)
    if tl.max(is_on_N.to(tl.int32), 0) > 0:
        top_N = tl.load(ROW_TOP + cell_N, mask=is_on_N, other=0.0)
        tile_NT = tl.arange(0, T)[None, :]
        at_NT = cell_N[:, None] * num_tiles + tile_NT
        is_on_NT = is_on_N[:, None] & (tile_NT < num_tiles)
        is_top_NT = is_on_NT & (tl.load(READ_TOP + at_NT, mask=is_on_NT, other=0.0) == top_N[:, None])
        tile_N = tl.min(tl.where(is_top_NT, tile_NT, T - 1), 1)
        ids_NW = tile_N[:, None] * W + tl.arange(0, W)[None, :]
        y_NW = logits_of(X, at_N, ids_NW, is_on_N[:, None] & (ids_NW < vocab))
        id_N = tl.min(tl.where(y_NW == top_N[:, None], ids_NW, 0x7FFFFFFF), 1)
        none_NT = tl.zeros([N, T], tl.float64)
        tl.store(TOPS + at_NT, top_N[:, None] + none_NT.to(top_N.dtype), mask=is_on_NT)
        tl.store(FACTOR + at_NT, none_NT + 1.0, mask=is_on_NT)
        tl.store(MASS + at_NT, tl.where(tile_NT == tile_N[:, None], 1.0, none_NT), mask=is_on_NT)
        tl.store(EDGE + cell_N, tl.zeros([N], EDGE.dtype.element_ty), mask=is_on_N)
        tl.store(LAST + cell_N, id_N, mask=is_on_N)


@triton.jit(do_not_specialize=_INTEGERS)
def find_edges(
    X, AT, TEMPERATURE, LIMITS, READ_TOP, ROW_TOP, KEPT, EDGE, KEY, RANK, BELOW, FAULT, stage, num_requests,
    num_rows, vocab, num_tiles, W: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Of a row the key of the gap at which top-k (stage 0) or top-p (stage 1) ends.

    With how many tokens stay that have it, and the mass of those before; none does where nothing is cut.
    """
    cell = tl.program_id(0).to(tl.int64)
    request = (cell // num_rows).to(tl.int32)
    at = tl.load(AT + cell)
    is_warm = tl.load(TEMPERATURE + request) != 0
    limit = tl.load(LIMITS + stage * num_requests + request)
    is_cut = is_warm & tl.where(stage == 0, (limit > 0) & (limit < vocab), limit < 1)
    fault = tl.load(FAULT + cell, mask=at >= 0, other=1)
    tl.store(RANK + cell, 0)
    if (at >= 0) & (fault == 0) & is_cut:
        top = tl.load(ROW_TOP + cell)
        scale = scale_of(TEMPERATURE, request, top.dtype)
        none = key_of(top * 0 + float("inf"))  # the gap of what has no weight
        goal = tl.where(stage == 0, limit, limit * tl.load(KEPT + cell))
        # What has less than its share of the mass that may go is no part of the mass that stays.
        share = key_of(tl.load(LIMITS + 2 * num_requests + request).to(top.dtype)) + 1
        low, high = none * 0 - 1, tl.minimum(tl.load(EDGE + cell), tl.where(stage == 0, none - 1, share))
        count, mass = tl.zeros((), tl.int32), tl.zeros((), tl.float64)  # of tokens up to `low`
        while high - low > 1:
            one, two = between(low, high, 0.3), between(low, high, 0.6)
            count_1C, mass_1C = tl.zeros([C], tl.int32), tl.zeros([C], tl.float64)
            count_2C, mass_2C = tl.zeros([C], tl.int32), tl.zeros([C], tl.float64)
            least_C, most_C = tl.zeros([C], tl.int32) + none, tl.zeros([C], tl.int32) + (none * 0 - 1)
            for tile in range(num_tiles):
                if key_of(top - tl.load(READ_TOP + cell * num_tiles + tile)) <= high:
                    for first in range(0, W, C):
                        ids = tile * W + first + tl.arange(0, C)
                        gap_C = top - logit_of(X, at, ids, ids < vocab)
                        key_C = key_of(gap_C)
                        is_in_C = (key_C > low) & (key_C <= high)
                        key_C = tl.where(is_in_C, key_C, none)  # beyond both
                        w_C = weight_of(gap_C * scale).to(tl.float64)
                        least_C = tl.minimum(least_C, key_C)
                        most_C = tl.maximum(most_C, tl.where(is_in_C, key_C, -1))
                        count_1C += (key_C <= one).to(tl.int32)
                        count_2C += (key_C <= two).to(tl.int32)
                        mass_1C += tl.where(key_C <= one, w_C, 0.0)
                        mass_2C += tl.where(key_C <= two, w_C, 0.0)
            count_1, mass_1 = count + tl.sum(count_1C), mass + tl.sum(mass_1C)
            count_2, mass_2 = count + tl.sum(count_2C), mass + tl.sum(mass_2C)
            least, most = tl.min(least_C), tl.max(most_C)
            is_under_2 = tl.where(stage == 0, count_2.to(tl.float64), mass_2) < goal
            is_under_1 = tl.where(stage == 0, count_1.to(tl.float64), mass_1) < goal
            low = tl.where(is_under_2, two, tl.where(is_under_1, one, low))
            high = tl.where(is_under_2, high, tl.where(is_under_1, two, one))
            count = tl.where(is_under_2, count_2, tl.where(is_under_1, count_1, count))
            mass = tl.where(is_under_2, mass_2, tl.where(is_under_1, mass_1, mass))
            # Both go on to gaps that some token has.
            low = tl.maximum(low, tl.minimum(least, high) - 1)
            high = tl.maximum(tl.minimum(high, most), low + 1)
        weight = weight_of(gap_of(high) * scale).to(tl.float64)
        rank = tl.where(stage == 0, (goal - count).to(tl.int32), rank_of(goal - mass, weight))
        tl.store(KEY + cell, high)
        tl.store(RANK + cell, rank)
        tl.store(BELOW + cell, mass)


@triton.jit(do_not_specialize=_INTEGERS)
def find_last(
    X, AT, TEMPERATURE, LIMITS, READ_TOP, ROW_TOP, KEPT, EDGE, LAST, KEY, RANK, BELOW, FAULT, stage,
    num_requests, num_rows, vocab, num_tiles, W: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The last id that stays of those at the edge; of what stayed before and of this stays the fewer."""
    cell = tl.program_id(0).to(tl.int64)
    request = (cell // num_rows).to(tl.int32)
    at = tl.load(AT + cell)
    fault = tl.load(FAULT + cell, mask=at >= 0, other=1)
    is_on = (at >= 0) & (fault == 0) & (tl.load(TEMPERATURE + request) != 0)
    rank = tl.load(RANK + cell, mask=is_on, other=0)
    top = tl.load(ROW_TOP + cell, mask=is_on, other=0.0)
    edge, last = tl.load(EDGE + cell, mask=is_on, other=0), tl.load(LAST + cell, mask=is_on, other=0)
    if rank > 0:
        key = tl.load(KEY + cell)
        seen, found = 0, 0x7FFFFFFF
        for tile in range(num_tiles):
            is_near = key_of(top - tl.load(READ_TOP + cell * num_tiles + tile)) <= key
            if is_near & (seen < rank):
                for first in range(0, W, C):
                    ids = tile * W + first + tl.arange(0, C)
                    is_tie_C = key_of(top - logit_of(X, at, ids, ids < vocab)) == key
                    order_C = tl.cumsum(is_tie_C.to(tl.int32), 0) + seen
                    is_last_C = is_tie_C & (order_C == rank)
                    found = tl.minimum(found, tl.min(tl.where(is_last_C, ids, 0x7FFFFFFF)))
                    seen = tl.max(order_C)
        weight = weight_of(gap_of(key) * scale_of(TEMPERATURE, request, top.dtype)).to(tl.float64)
        tl.store(KEPT + cell, tl.load(BELOW + cell) + tl.minimum(seen, rank).to(tl.float64) * weight)
        last = tl.where(key < edge, found, tl.where(key == edge, tl.minimum(found, last), last))
        edge = tl.minimum(edge, key)
    gap = tl.load(LIMITS + 3 * num_requests + request).to(top.dtype)
    if (stage == 1) & (gap < float("inf")):  # min-p
        last = tl.where(key_of(gap) < edge, 0x7FFFFFFF, last)
        edge = tl.minimum(edge, key_of(gap))
    tl.store(LAST + cell, last, mask=is_on)
    tl.store(EDGE + cell, edge, mask=is_on)


@triton.jit
def logit_of(X, at, ids, is_on):
    """As `logits_of`, of one row."""
    x = tl.load(X + at + ids, mask=is_on, other=float("-inf"))
    if X.dtype.element_ty == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit(do_not_specialize=_INTEGERS)
def read_kept(
    X, AT, TEMPERATURE, ROW_TOP, EDGE, LAST, MASS, num_cells, num_rows, vocab, num_tiles, N: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """Of a tile of rows that are cut the sum of the weights that stay."""
    cell_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    at_N = tl.load(AT + cell_N, mask=cell_N < num_cells, other=-1)
    top_N = tl.load(ROW_TOP + cell_N, mask=at_N >= 0, other=0.0)
    edge_N = tl.load(EDGE + cell_N, mask=at_N >= 0, other=0)
    is_on_N = (at_N >= 0) & (edge_N <= key_of(top_N * 0 + float("inf")))
    if tl.max(is_on_N.to(tl.int32), 0) > 0:
        tile = tl.program_id(1)
        ids_NW = (tile * W + tl.arange(0, W))[None, :]
        is_on_NW = is_on_N[:, None] & (ids_NW < vocab)
        last_N = tl.load(LAST + cell_N, mask=is_on_N, other=0)
        scale_N = scale_of(TEMPERATURE, tl.where(is_on_N, cell_N // num_rows, 0), top_N.dtype)
        one_N = tl.full([N], 1.0, tl.float64)
        y_NW = logits_of(X, at_N, ids_NW, is_on_NW)
        w_NW = probs_of(y_NW, ids_NW, is_on_NW, top_N, one_N, edge_N, last_N, scale_N, 0)
        tl.store(MASS + cell_N * num_tiles + tile, tl.sum(w_NW, 1), mask=is_on_N)


@triton.jit(do_not_specialize=_INTEGERS)
def cut_rows(AT, ROW_TOP, TOPS, FACTOR, MASS, EDGE, num_cells, num_tiles, N: tl.constexpr, T: tl.constexpr):
    """`Tiled` anew, of the rows that are cut."""
    cell_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    at_N = tl.load(AT + cell_N, mask=cell_N < num_cells, other=-1)
    top_N = tl.load(ROW_TOP + cell_N, mask=at_N >= 0, other=0.0)
    edge_N = tl.load(EDGE + cell_N, mask=at_N >= 0, other=0)
    is_on_N = (at_N >= 0) & (edge_N <= key_of(top_N * 0 + float("inf")))
    tile_NT = tl.arange(0, T)[None, :]
    at_NT = cell_N[:, None] * num_tiles + tile_NT
    is_on_NT = is_on_N[:, None] & (tile_NT < num_tiles)
    mass_NT = tl.load(MASS + at_NT, mask=is_on_NT, other=0.0)
    factor_NT = (1.0 / tl.sum(mass_NT, 1))[:, None] + mass_NT * 0
    tl.store(TOPS + at_NT, top_N[:, None] + (mass_NT * 0).to(top_N.dtype), mask=is_on_NT)
    tl.store(FACTOR + at_NT, factor_NT, mask=is_on_NT)
    tl.store(MASS + at_NT, mass_NT * factor_NT, mask=is_on_NT)


def cut(source: Source, read: Read, known: Tiled) -> None:
    """Rows that are cut or greedy, from what a first look has read, into what is known of them."""
    size, num_rows, vocab_size = source.shape
    shape = read.shape
    rows, row = (source.logits, source.at_BL, source.temperature_B), (read.row_top_BL, read.row_mass_BL)
    numbers, edges = (num_rows, vocab_size, read.num_tiles), (known.edge_BL, known.last_BL)
    num_cells, programs = size * num_rows, triton.cdiv(size * num_rows, shape.rows)
    if source.cut is not None:
        found = (torch.empty_like(known.edge_BL), torch.empty_like(known.last_BL), torch.empty_like(row[1]))
        looked = (*rows, _limits(source, source.cut), read.top_BLT, *row)
        for stage in (0, 1):
            numbered = (*found, known.fault_BL, stage, size, *numbers)
            find_edges[(num_cells,)](*looked, known.edge_BL, *numbered, **_search(shape))
            find_last[(num_cells,)](*looked, *edges, *numbered, **_search(shape))
        read_kept[programs, read.num_tiles](
            *(*rows, read.row_top_BL, *edges, known.mass_BLT, num_cells, *numbers), **_of_tiles(shape)
        )
        tiles = (known.top_BLT, known.factor_BLT, known.mass_BLT, known.edge_BL)
        cut_rows[(programs,)](
            *(source.at_BL, read.row_top_BL, *tiles, num_cells, read.num_tiles), **_of_rows(shape)
        )
    if source.has_greedy:
        take_best[(programs,)](
            *(*rows, read.top_BLT, read.row_top_BL, *known.tensors, num_cells, *numbers), **_of_best(shape)
        )


def _limits(source: Source, cut: Cut) -> Tensor:
    """By request top-k, top-p, the gap that no token over its share exceeds, and that of min-p: (4, B)."""
    top_k, top_p, min_p = (each.double() for each in cut[:3])
    temperature_B = source.temperature_B.clamp(min=torch.finfo(torch.float32).tiny)
    share = (1 - top_p).clamp(min=1e-30) / source.shape[2]
    share_gap = 1.001 * temperature_B * (1 - share.log())  # a little more than it is: weights are rounded
    return torch.stack([top_k, top_p, share_gap, temperature_B * (0 - min_p.log())])


def _of_tiles(shape: Shape) -> dict[str, Any]:
    return {"N": shape.rows, "W": shape.width, "num_warps": 8}


def _search(shape: Shape) -> dict[str, Any]:
    return {"W": shape.width, "C": _PART, "num_warps": 8}


def _of_best(shape: Shape) -> dict[str, Any]:
    return {**_of_tiles(shape), "T": shape.most_tiles}


def _of_rows(shape: Shape) -> dict[str, Any]:
    return {"N": shape.rows, "T": shape.most_tiles, "num_warps": 4}


def builds() -> Iterator[Build]:
    """Every way in which these kernels ship."""
    for logits in LOGITS:
        yield build(find_edges, f"edges {logits}", logits, _search(SHAPE))
        yield build(find_last, f"last {logits}", logits, _search(SHAPE))
        yield build(read_kept, f"kept {logits}", logits, _of_tiles(SHAPE))
        yield build(take_best, f"best {logits}", logits, _of_best(SHAPE))
        if logits != "bf16":
            yield build(cut_rows, f"cut {logits}", logits, _of_rows(SHAPE))
