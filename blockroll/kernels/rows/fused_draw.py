"""A token of each row by inverse CDF, from the row's law or from what a rejected draft leaves of it.

Shapes: B requests, L rows of each, K drafts, M draws of each, N rows of a program, T tiles, W ids of a tile,
C ids of a block of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockroll.kernels.builds import Build
from blockroll.kernels.philox import Coins, Uniforms
from blockroll.kernels.rows.fused_builds import LOGITS, build
from blockroll.kernels.rows.fused_reading import logits_of, prob_of, probs_of, scale_of, uniform_of
from blockroll.kernels.rows.fused_sources import Source
from blockroll.kernels.rows.tiles import SHAPE, Shape, Tiled, shape_of

_ASKED = 128  # tokens of a program
_BLOCK = 64  # ids whose sum is searched for before they are
_INTEGERS = [
    "num_requests", "num_draws", "num_rows", "num_drafts", "num_columns", "is_given", "vocab", "num_tiles",
    "is_dense", "is_dense_draft",
]  # fmt: skip


@triton.jit
def left_of(p, q):
    """What a rejected draft leaves: the positive part, and all where a draft's row is not known."""
    return tl.where(q == q, tl.maximum(p - q, 0.0), p)


@triton.jit
def place_of(mass_NX, goal_N, X: tl.constexpr):
    """Where the cumulative masses first exceed a goal, never where there is no mass, and what is before."""
    place_NX = tl.arange(0, X)[None, :]
    until_NX = tl.cumsum(mass_NX, 1)
    is_hit_NX = (until_NX > goal_N[:, None]) & (mass_NX > 0)
    at_N = tl.min(tl.where(is_hit_NX, place_NX, X), 1)
    # Rounding can carry the goal onto all there is: the last place that has any.
    at_N = tl.where(at_N == X, tl.max(tl.where(mass_NX > 0, place_NX, 0), 1), at_N)
    return at_N, tl.max(tl.where(place_NX < at_N[:, None], until_NX, 0.0), 1)


@triton.jit
def law_of(
    X, AT, TEMPERATURE, TOP, FACTOR, EDGE, LAST, cell_N, request_N, tile_N, ids_NC, is_on_NC, num_tiles,
    is_dense,
):  # fmt: skip
    """Probabilities of ids of a tile of each row, float64."""
    y_NC = logits_of(X, tl.load(AT + cell_N), ids_NC, is_on_NC)
    scale_N = scale_of(TEMPERATURE, request_N, y_NC.dtype)
    at_N, edge_N, last_N = cell_N * num_tiles + tile_N, tl.load(EDGE + cell_N), tl.load(LAST + cell_N)
    top_N, factor_N = tl.load(TOP + at_N), tl.load(FACTOR + at_N)
    return probs_of(y_NC, ids_NC, is_on_NC, top_N, factor_N, edge_N, last_N, scale_N, is_dense)


@triton.jit
def both_of(
    X, AT, TEMPERATURE, TOP, FACTOR, EDGE, LAST, QX, QAT, QTEMPERATURE, QTOP, QFACTOR, QEDGE, QLAST, cell_N,
    draft_N, request_N, tile_N, ids_NC, is_on_N, is_left_N, vocab, num_tiles, is_dense, is_dense_draft,
):  # fmt: skip
    """Probabilities of ids under the target, and what a token is drawn from: these, or what is left."""
    is_on_NC = is_on_N[:, None] & (ids_NC < vocab)
    p_NC = law_of(
        X, AT, TEMPERATURE, TOP, FACTOR, EDGE, LAST, cell_N, request_N, tile_N, ids_NC, is_on_NC, num_tiles,
        is_dense,
    )  # fmt: skip
    w_NC = p_NC
    if tl.max(is_left_N.to(tl.int32), 0) > 0:
        is_met_NC = is_on_NC & is_left_N[:, None]
        q_NC = law_of(
            QX, QAT, QTEMPERATURE, QTOP, QFACTOR, QEDGE, QLAST, draft_N, request_N, tile_N, ids_NC, is_met_NC,
            num_tiles, is_dense_draft,
        )  # fmt: skip
        w_NC = tl.where(is_left_N[:, None], left_of(p_NC, q_NC), p_NC)
    return p_NC, w_NC


@triton.jit(do_not_specialize=_INTEGERS)
def place_tiles(
    X, AT, TEMPERATURE, TOP, FACTOR, EDGE, LAST, MASS, QX, QAT, QTEMPERATURE, QTOP, QFACTOR, QEDGE, QLAST,
    LEFT, DRAWS, UNIFORMS, SEEDS, WORDS, PLACED, GOALS, BLOCKS, FIGURES, num_requests, num_draws, num_rows,
    num_drafts, num_columns, is_given, vocab, num_tiles, is_dense, is_dense_draft, N: tl.constexpr,
    W: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The tile that each draw falls into, how far into it, and the masses of its blocks.

    `DRAWS` are rows, and then columns. A row below 0 draws nothing; a column c below 0 stands for column
    -1 - c, and draws from what is left.
    """
    B: tl.constexpr = W // C
    draw_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    is_draw_N = draw_N < num_requests * num_draws
    row_N = tl.load(DRAWS + draw_N, mask=is_draw_N, other=-1)
    draw_N = tl.where(is_draw_N, draw_N, 0)
    request_N = draw_N // num_draws
    cell_N = request_N * num_rows + tl.maximum(row_N, 0)
    is_on_N = (row_N >= 0) & (tl.load(AT + cell_N) >= 0)
    tl.store(PLACED + draw_N, tl.full([N], -1, tl.int32), mask=is_draw_N & (is_on_N == 0))
    if tl.max(is_on_N.to(tl.int32), 0) > 0:
        row_N = tl.maximum(row_N, 0)
        column_N = tl.load(DRAWS + num_requests * num_draws + draw_N)
        is_left_N = is_on_N & (column_N < 0)
        column_N = tl.where(column_N < 0, -1 - column_N, column_N)
        plane = num_requests * num_columns
        u_N = uniform_of(UNIFORMS, SEEDS, WORDS, request_N, column_N, num_columns, plane, is_given, is_on_N)
        tile_NT = tl.arange(0, T)[None, :]
        is_tile_NT = is_on_N[:, None] & (tile_NT < num_tiles)
        mass_NT = tl.load(MASS + cell_N[:, None] * num_tiles + tile_NT, mask=is_tile_NT, other=0.0)
        left_NT = tl.load(
            LEFT + request_N[:, None] * num_tiles + tile_NT, mask=is_tile_NT & is_left_N[:, None], other=0.0
        )
        # Rounding can reject a draft that leaves nothing: draft and target are equal then.
        is_left_N = is_left_N & (tl.sum(left_NT, 1) > 0)
        mass_NT = tl.where(is_left_N[:, None], left_NT, mass_NT)
        whole_N = tl.sum(mass_NT, 1)
        goal_N = u_N * whole_N
        tile_N, low_N = place_of(mass_NT, goal_N, T)
        out_N, plane = cell_N, num_requests * num_rows
        tl.store(FIGURES + 3 * plane + out_N, whole_N, mask=is_on_N)
        tl.store(FIGURES + 4 * plane + out_N, u_N, mask=is_on_N)
        tl.store(PLACED + draw_N, tile_N * 2 + is_left_N.to(tl.int32), mask=is_on_N)
        tl.store(GOALS + draw_N, goal_N - low_N, mask=is_on_N)
        tl.store(GOALS + num_requests * num_draws + draw_N, low_N, mask=is_on_N)
        ids_NW = tile_N[:, None] * W + tl.arange(0, W)[None, :]
        _, w_NW = both_of(
            X, AT, TEMPERATURE, TOP, FACTOR, EDGE, LAST, QX, QAT, QTEMPERATURE, QTOP, QFACTOR, QEDGE, QLAST,
            cell_N, tl.where(is_left_N, request_N * num_drafts + row_N, 0), request_N, tile_N, ids_NW,
            is_on_N, is_left_N, vocab, num_tiles, is_dense, is_dense_draft,
        )  # fmt: skip
        at_NB = draw_N[:, None] * B + tl.arange(0, B)[None, :]
        tl.store(BLOCKS + at_NB, tl.sum(tl.reshape(w_NW, [N, B, C]), 2), mask=is_on_N[:, None])


@triton.jit(do_not_specialize=_INTEGERS)
def draw_ids(
    X, AT, TEMPERATURE, TOP, FACTOR, EDGE, LAST, QX, QAT, QTEMPERATURE, QTOP, QFACTOR, QEDGE, QLAST, DRAWS,
    PLACED, GOALS, BLOCKS, TOKENS, FIGURES, num_requests, num_draws, num_rows, num_drafts, vocab, num_tiles,
    is_dense, is_dense_draft, N: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The id that each draw falls on, in the tile that it fell into, is put beside its row."""
    B: tl.constexpr = W // C
    draw_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    placed_N = tl.load(PLACED + draw_N, mask=draw_N < num_requests * num_draws, other=-1)
    if tl.max(placed_N, 0) >= 0:
        is_on_N = placed_N >= 0
        draw_N = tl.where(is_on_N, draw_N, 0)
        tile_N, is_left_N = tl.where(is_on_N, placed_N // 2, 0), is_on_N & (placed_N % 2 == 1)
        row_N, request_N = tl.maximum(tl.load(DRAWS + draw_N), 0), draw_N // num_draws
        goal_N = tl.load(GOALS + draw_N)
        low_N = tl.load(GOALS + num_requests * num_draws + draw_N)
        at_NB = draw_N[:, None] * B + tl.arange(0, B)[None, :]
        block_N, before_N = place_of(tl.load(BLOCKS + at_NB, mask=is_on_N[:, None], other=0.0), goal_N, B)
        goal_N -= before_N
        low_N += before_N
        ids_NC = (tile_N * W + block_N * C)[:, None] + tl.arange(0, C)[None, :]
        cell_N = request_N * num_rows + row_N
        p_NC, w_NC = both_of(
            X, AT, TEMPERATURE, TOP, FACTOR, EDGE, LAST, QX, QAT, QTEMPERATURE, QTOP, QFACTOR, QEDGE, QLAST,
            cell_N, tl.where(is_left_N, request_N * num_drafts + row_N, 0), request_N, tile_N, ids_NC,
            is_on_N, is_left_N, vocab, num_tiles, is_dense, is_dense_draft,
        )  # fmt: skip
        place_N, before_N = place_of(w_NC, goal_N, C)
        low_N += before_N
        is_it_NC = tl.arange(0, C)[None, :] == place_N[:, None]
        plane = num_requests * num_rows
        token_N = tile_N * W + block_N * C + place_N
        tl.store(TOKENS + cell_N, token_N.to(tl.int64), mask=is_on_N)
        tl.store(FIGURES + cell_N, tl.sum(tl.where(is_it_NC, p_NC, 0.0), 1), mask=is_on_N)
        tl.store(FIGURES + plane + cell_N, low_N, mask=is_on_N)
        high_N = low_N + tl.sum(tl.where(is_it_NC, w_NC, 0.0), 1)
        tl.store(FIGURES + 2 * plane + cell_N, high_N, mask=is_on_N)


@triton.jit(
    do_not_specialize=["num_cells", "num_asked", "num_rows", "vocab", "num_tiles", "width", "is_dense"]
)
def ask_rows(
    X, AT, TEMPERATURE, TOP, FACTOR, EDGE, LAST, DRAFTS, PROBS, num_cells, num_asked, num_rows, vocab,
    num_tiles, width, is_dense, N: tl.constexpr,
):  # fmt: skip
    """The probability of a token of each of the first rows of each request; of ids that are none, 0."""
    asked_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    is_on_N = asked_N < num_cells
    request_N = tl.where(is_on_N, asked_N // num_asked, 0)
    cell_N = request_N * num_rows + tl.where(is_on_N, asked_N % num_asked, 0)
    id_N = tl.load(DRAFTS + asked_N, mask=is_on_N, other=-1)
    at_N = tl.load(AT + cell_N)
    is_id_N = (at_N >= 0) & (id_N >= 0) & (id_N < vocab)
    id_N = tl.where(is_id_N, id_N, 0)
    y_N = tl.load(X + at_N + id_N, mask=is_id_N, other=0.0)
    if X.dtype.element_ty != tl.float64:
        y_N = y_N.to(tl.float32)
    tile_N = cell_N * num_tiles + id_N // width
    p_N = prob_of(
        y_N, id_N, is_id_N, tl.load(TOP + tile_N), tl.load(FACTOR + tile_N), tl.load(EDGE + cell_N),
        tl.load(LAST + cell_N), scale_of(TEMPERATURE, request_N, y_N.dtype), is_dense,
    )  # fmt: skip
    tl.store(PROBS + asked_N, p_N, mask=is_on_N)


@dataclass(frozen=True, slots=True)
class Draws:
    """Room for a token beside each row: NaN where nothing is drawn, and token 0.

    Figures, float64: its probability under the row's law; of what it was drawn from, what lies before it,
    that with its own, and all; and the uniform that drew it.
    """

    token_ids_BL: Tensor  # int64
    figures_5BL: Tensor

    @classmethod
    def room(cls, size: int, num_rows: int, device: torch.device) -> "Draws":
        figures_5BL = torch.full((5, size, num_rows), torch.nan, dtype=torch.float64, device=device)
        return cls(torch.zeros((size, num_rows), dtype=torch.int64, device=device), figures_5BL)


@dataclass(frozen=True, slots=True)
class Left:
    """What drafts are verified by besides the target: their rows, and by tile what they leave of its."""

    source: Source
    tiled: Tiled
    mass_BT: Tensor  # float64


def draw(
    source: Source,
    tiled: Tiled,
    uniforms: Uniforms,
    draws_2BM: Tensor,
    out: Draws,
    left: Left | None = None,
) -> None:
    """As `place_tiles` has it: M draws of each request, int32 rows and columns."""
    size, num_rows, vocab_size = source.shape
    num_draws = draws_2BM.shape[2]
    if size * num_draws == 0:
        return
    shape = shape_of(vocab_size)
    if left is None:
        left = Left(source, tiled, tiled.mass_BLT)
    law, known = left.source, left.tiled
    device, programs = source.logits.device, (triton.cdiv(size * num_draws, shape.rows),)
    placed_BM = torch.empty((size, num_draws), dtype=torch.int32, device=device)
    goals_2BM = torch.empty((2, size, num_draws), dtype=torch.float64, device=device)
    blocks = torch.empty((size, num_draws, shape.width // _BLOCK), dtype=torch.float64, device=device)
    rows, drafted = law_arguments(source, tiled), law_arguments(law, known)
    tiles = (vocab_size, shape.num_tiles(vocab_size), int(source.is_dense), int(law.is_dense))
    place_tiles[programs](
        *(*rows, tiled.mass_BLT, *drafted, left.mass_BT, draws_2BM, *uniforms_arguments(uniforms, source)),
        *(placed_BM, goals_2BM, blocks, out.figures_5BL, size, num_draws, num_rows, law.shape[1]),
        *(uniforms.shape[1], int(isinstance(uniforms, Tensor)), *tiles),
        **_of_tiles(shape, source.is_wide),
    )
    draw_ids[programs](
        *(*rows, *drafted, draws_2BM, placed_BM, goals_2BM, blocks, out.token_ids_BL, out.figures_5BL),
        *(size, num_draws, num_rows, law.shape[1], *tiles),
        **_of_blocks(shape),
    )


def ask(source: Source, tiled: Tiled, token_ids_BK: Tensor, probs_BK: Tensor) -> None:
    """Probabilities of a token of each of the first K rows, float64, into a contiguous place."""
    (size, num_rows, vocab_size), num_asked = source.shape, token_ids_BK.shape[1]
    shape = shape_of(vocab_size)
    ask_rows[(triton.cdiv(size * num_asked, _ASKED),)](
        *(*law_arguments(source, tiled), token_ids_BK.contiguous(), probs_BK, size * num_asked, num_asked),
        *(num_rows, vocab_size, shape.num_tiles(vocab_size), shape.width, int(source.is_dense)),
        **_of_tokens(),
    )


def law_arguments(source: Source, tiled: Tiled) -> tuple[Tensor, ...]:
    """Where rows are, and what makes probabilities of their logits."""
    return (
        *(source.logits, source.at_BL, source.temperature_B, tiled.top_BLT, tiled.factor_BLT),
        *(tiled.edge_BL, tiled.last_BL),
    )


def uniforms_arguments(uniforms: Uniforms, source: Source) -> tuple[Tensor, Tensor, Tensor]:
    """Uniforms, seeds and counter words; something of their types stands where nothing does."""
    if isinstance(uniforms, Coins):
        return source.temperature_B, uniforms.seeds_B.contiguous(), uniforms.words_3BN.contiguous()
    return uniforms.contiguous(), source.at_BL, source.at_BL


@lru_cache(maxsize=64)
def all_rows(size: int, num_rows: int, device: torch.device) -> Tensor:
    """A draw of each row by its own column, int32 (2, B, L): made once."""
    return torch.arange(num_rows, dtype=torch.int32, device=device).repeat(2, size, 1)


def _of_tiles(shape: Shape, is_wide: bool) -> dict[str, Any]:
    num_warps = 16 if is_wide else 8  # float64 takes twice the registers
    return {"N": shape.rows, "W": shape.width, "T": shape.most_tiles, "C": _BLOCK, "num_warps": num_warps}


def _of_blocks(shape: Shape) -> dict[str, Any]:
    return {"N": shape.rows, "W": shape.width, "C": _BLOCK, "num_warps": 1}


def _of_tokens() -> dict[str, Any]:
    return {"N": _ASKED, "num_warps": 4}


def builds() -> Iterator[Build]:
    """Every way in which these kernels ship."""
    for logits in LOGITS:
        yield build(place_tiles, f"place {logits}", logits, _of_tiles(SHAPE, logits == "fp64"))
        yield build(draw_ids, f"draw {logits}", logits, _of_blocks(SHAPE))
        yield build(ask_rows, f"ask {logits}", logits, _of_tokens())
