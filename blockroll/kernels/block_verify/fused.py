"""`block_verify` by Triton: each row of logits is read once, and no row of probabilities is formed.

Rows are read by tile (`kernels/rows/fused_laws.py`); then drafts are judged, what a rejected one leaves is
summed by tile, and tokens are drawn. All of it is queued, and nothing waits.

Shapes: B requests, K drafted tokens, L = K + 1 target positions, N requests of a program, D drafts of a look,
W ids of a tile.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockroll.kernels.builds import Build
from blockroll.kernels.philox import Uniforms
from blockroll.kernels.rows.fused_builds import LOGITS, build
from blockroll.kernels.rows.fused_draw import (
    Draws,
    Left,
    all_rows,
    ask,
    draw,
    law_arguments,
    law_of,
    left_of,
    uniforms_arguments,
)
from blockroll.kernels.rows.fused_laws import logprobs, tiled
from blockroll.kernels.rows.fused_reading import uniform_of
from blockroll.kernels.rows.fused_sources import Source, source_of, source_of_chosen
from blockroll.kernels.rows.logit_rows import LogitRows
from blockroll.kernels.rows.packed import Logits
from blockroll.kernels.rows.tiles import SHAPE, Shape, Tiled, shape_of
from blockroll.types import Draft, Evidence, PointMass, Rows, Verdict

_REQUESTS, _DRAFTS = 16, 16  # of a look at tokens
_INTEGERS = [
    "num_requests", "num_rows", "num_drafts", "num_draws", "num_columns", "is_given", "settles",
    "vocab", "num_tiles", "width", "is_dense", "is_dense_draft",
]  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def judge(
    DRAFTS, NUM_DRAFTS, CERTAIN, UNIFORMS, SEEDS, WORDS, JUDGED, TOKENS, PROBS, IS_DRAFT, COMMITTED, DRAWS,
    num_requests, num_rows, num_drafts, num_draws, num_columns, is_given, settles,
    N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """How many drafts stand of each request whose drafts were drawn, and what every request is to draw.

    Where drafts were certain, that is from each row up to the one behind the last draft, by its own column.
    `JUDGED` are the drafts' probabilities under their law, under the target, and accept coins.
    """
    request_N = tl.program_id(0) * N + tl.arange(0, N)
    is_request_N = request_N < num_requests
    request_N = tl.where(is_request_N, request_N, 0).to(tl.int64)
    is_certain_N = tl.load(CERTAIN + request_N) != 0
    count_N = tl.load(NUM_DRAFTS + request_N).to(tl.int32)
    standing_N = count_N
    plane, judged = num_requests * num_columns, num_requests * num_drafts
    for first in range(0, tl.maximum(num_drafts, num_draws), D):
        offset_ND = first + tl.arange(0, D)[None, :] + tl.zeros([N, 1], tl.int32)
        is_on_ND = is_request_N[:, None] & (offset_ND < count_N[:, None])
        is_drawn_ND = is_on_ND & (is_certain_N == 0)[:, None]
        draft_ND = request_N[:, None] * num_drafts + offset_ND
        q_ND = tl.load(JUDGED + draft_ND, mask=is_drawn_ND, other=1.0)
        p_ND = tl.load(JUDGED + judged + draft_ND, mask=is_drawn_ND, other=0.0)
        request_ND = request_N[:, None] + offset_ND * 0
        u_ND = uniform_of(
            UNIFORMS, SEEDS, WORDS, request_ND, offset_ND, num_columns, plane, is_given, is_drawn_ND
        )
        # u * draft < target is u < target / draft without the division, so draft == 0 is no special case.
        is_failed_ND = is_drawn_ND & ((u_ND * q_ND < p_ND) == 0)
        standing_N = tl.minimum(standing_N, tl.min(tl.where(is_failed_ND, offset_ND, count_N[:, None]), 1))
        tl.store(JUDGED + draft_ND, q_ND, mask=is_on_ND)
        tl.store(JUDGED + 2 * judged + draft_ND, u_ND, mask=is_drawn_ND)
        is_kept_ND = is_drawn_ND & (offset_ND < standing_N[:, None])
        out_ND = request_ND * num_rows + offset_ND
        tl.store(TOKENS + out_ND, tl.load(DRAFTS + draft_ND, mask=is_kept_ND, other=0), mask=is_kept_ND)
        tl.store(PROBS + out_ND, p_ND, mask=is_kept_ND)
        tl.store(IS_DRAFT + out_ND, is_kept_ND, mask=is_kept_ND)
        # The draws of certain drafts; the one of those that were drawn is the first.
        is_draw_ND = (
            is_request_N[:, None] & (offset_ND < num_draws) & (is_certain_N[:, None] | (offset_ND > 0))
        )
        is_row_ND = is_certain_N[:, None] & (offset_ND <= count_N[:, None])
        at_ND = request_ND * num_draws + offset_ND
        tl.store(DRAWS + at_ND, tl.where(is_row_ND, offset_ND, -1), mask=is_draw_ND)
        tl.store(DRAWS + num_requests * num_draws + at_ND, offset_ND, mask=is_draw_ND)
    is_drawn_N = is_request_N & (is_certain_N == 0)
    row_N = tl.where((settles != 0) & (standing_N > 0), -1, standing_N)
    column_N = tl.where(standing_N < count_N, -num_columns, num_columns - 1)
    tl.store(DRAWS + request_N * num_draws, row_N, mask=is_drawn_N)
    tl.store(DRAWS + (num_requests + request_N) * num_draws, column_N, mask=is_drawn_N)
    committed_N = tl.where(settles != 0, 1, standing_N + 1).to(tl.int64)
    tl.store(COMMITTED + request_N, committed_N, mask=is_drawn_N)


@triton.jit(do_not_specialize=_INTEGERS)
def leave(
    X, AT, TEMPERATURE, TOP, FACTOR, EDGE, LAST, QX, QAT, QTEMPERATURE, QTOP, QFACTOR, QEDGE, QLAST, DRAWS,
    LEFT, num_requests, num_rows, num_drafts, num_draws, vocab, num_tiles, is_dense, is_dense_draft,
    N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Of a tile of the row at which a draft was rejected the sum of what that leaves."""
    request_N = tl.program_id(0) * N + tl.arange(0, N)
    is_request_N = request_N < num_requests
    request_N = tl.where(is_request_N, request_N, 0).to(tl.int64)
    row_N = tl.load(DRAWS + request_N * num_draws)
    column_N = tl.load(DRAWS + (num_requests + request_N) * num_draws)
    is_on_N = is_request_N & (row_N >= 0) & (column_N < 0)
    if tl.max(is_on_N.to(tl.int32), 0) > 0:
        tile = tl.program_id(1)
        ids_NW = (tile * W + tl.arange(0, W))[None, :]
        is_on_NW = is_on_N[:, None] & (ids_NW < vocab)
        row_N = tl.where(is_on_N, row_N, 0)
        tile_N = row_N * 0 + tile
        p_NW = law_of(
            X, AT, TEMPERATURE, TOP, FACTOR, EDGE, LAST, request_N * num_rows + row_N, request_N, tile_N,
            ids_NW, is_on_NW, num_tiles, is_dense,
        )  # fmt: skip
        q_NW = law_of(
            QX, QAT, QTEMPERATURE, QTOP, QFACTOR, QEDGE, QLAST, request_N * num_drafts + row_N, request_N,
            tile_N, ids_NW, is_on_NW, num_tiles, is_dense_draft,
        )  # fmt: skip
        left_N = tl.sum(tl.where(is_on_NW, left_of(p_NW, q_NW), 0.0), 1)
        tl.store(LEFT + request_N * num_tiles + tile, left_N, mask=is_on_N)


@triton.jit(do_not_specialize=_INTEGERS)
def compare(
    DRAFTS, NUM_DRAFTS, CERTAIN, TOKENS, IS_DRAFT, COMMITTED, num_requests, num_rows, num_drafts, settles,
    N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Of drafts that were certain those stand that are the tokens drawn, up to the first that is not."""
    request_N = tl.program_id(0) * N + tl.arange(0, N)
    is_on_N = request_N < num_requests
    request_N = tl.where(is_on_N, request_N, 0).to(tl.int64)
    is_on_N = is_on_N & (tl.load(CERTAIN + request_N) != 0)
    standing_N = tl.load(NUM_DRAFTS + request_N).to(tl.int32)
    for first in range(0, num_drafts, D):
        offset_D = first + tl.arange(0, D)[None, :]
        is_on_ND = is_on_N[:, None] & (offset_D < standing_N[:, None])
        out_ND = request_N[:, None] * num_rows + offset_D
        token_ND = tl.load(TOKENS + out_ND, mask=is_on_ND, other=0)
        id_ND = tl.load(DRAFTS + request_N[:, None] * num_drafts + offset_D, mask=is_on_ND, other=0)
        missed_ND = tl.where(is_on_ND & (token_ND != id_ND), offset_D, standing_N[:, None])
        standing_N = tl.minimum(standing_N, tl.min(missed_ND, 1))
        is_kept_ND = is_on_ND & (offset_D < standing_N[:, None])
        tl.store(IS_DRAFT + out_ND, is_kept_ND, mask=is_kept_ND)
    committed_N = tl.where(settles != 0, 1, standing_N + 1).to(tl.int64)
    tl.store(COMMITTED + request_N, committed_N, mask=is_on_N)


def verify(draft: Draft, target: Rows | Tensor, uniforms_BL: Uniforms) -> Verdict:
    """The longest draft prefix the target allows, and one token more from the target."""
    return _verified(draft, target, uniforms_BL, settles=False)


def settle(draft: Draft, target: Rows | Tensor, uniforms_B2: Uniforms) -> Verdict:
    """The first position alone: its draft if accepted, else what replaces it."""
    return _verified(draft, target, uniforms_B2, settles=True)


def chosen_logprobs(
    parts: Sequence[Logits], is_chosen_BL: Tensor, token_ids_BL: Tensor, temperature_B: Tensor
) -> Tensor:
    """Log-probabilities under the causal policy, float64 (B, L): full vocabulary, T = 1 where greedy."""
    logprobs_BL = torch.zeros(token_ids_BL.shape, dtype=torch.float64, device=token_ids_BL.device)
    token_ids_BL = token_ids_BL.contiguous()
    scale_B, first = torch.where(temperature_B == 0, 1.0, temperature_B.double()), 0
    for part in parts:
        last = first + part.shape[1]
        source = source_of_chosen(part, scale_B, is_chosen_BL[:, first:last])
        logprobs(source, token_ids_BL, logprobs_BL, first)
        first = last
    return logprobs_BL


def _verified(draft: Draft, target: Rows | Tensor, uniforms: Uniforms, *, settles: bool) -> Verdict:
    size, device, is_certain = len(draft.token_ids_BK), draft.token_ids_BK.device, draft.is_certain
    drafts_BK = (draft.token_ids_BK[:, :1] if settles else draft.token_ids_BK).contiguous()
    num_drafts = drafts_BK.shape[1]
    counts_B, width = draft.num_drafts_B.clamp(max=num_drafts), 1 if settles else num_drafts + 1
    source, law = source_of(target, counts_B if settles else counts_B + 1), None
    if num_drafts and not isinstance(draft.law, PointMass):
        law = source_of(draft.law, counts_B)
        dtype = torch.promote_types(source.logits.dtype, law.logits.dtype)
        source, law = source.read_as(dtype), law.read_as(dtype)
    known, drawn = tiled(source), Draws.room(size, source.shape[1], device)
    certain_B = _flags(size, is_certain, device) if isinstance(is_certain, bool) else is_certain
    is_draft_BL = torch.zeros(drawn.token_ids_BL.shape, dtype=torch.bool, device=device)
    num_committed_B = torch.ones_like(counts_B)
    probs_3BK = torch.full((3, size, num_drafts), torch.nan, dtype=torch.float64, device=device)
    if num_drafts == 0:
        draw(source, known, uniforms, all_rows(size, 1, device), drawn)
    elif size:
        ask(source, known, drafts_BK, probs_3BK[1])
        num_tiles, left = known.top_BLT.shape[2], None
        if law is not None:
            left = Left(law, tiled(law), probs_3BK.new_empty((size, num_tiles)))
            asked = draft.law.known_of(draft.token_ids_BK) if isinstance(draft.law, LogitRows) else None
            if asked is None:
                ask(law, left.tiled, drafts_BK, probs_3BK[0])
            else:
                probs_3BK[0] = asked[:, :num_drafts]
        num_draws = 1 if settles or is_certain is False else width
        draws_2BM = torch.empty((2, size, num_draws), dtype=torch.int32, device=device)
        given = (drafts_BK, counts_B, certain_B.contiguous())
        coins = (*uniforms_arguments(uniforms, source), probs_3BK)
        decided = (drawn.token_ids_BL, drawn.figures_5BL, is_draft_BL, num_committed_B)
        numbers, programs = (size, source.shape[1], num_drafts), triton.cdiv(size, _REQUESTS)
        judge[(programs,)](
            *(*given, *coins, *decided, draws_2BM, *numbers, num_draws, uniforms.shape[1]),
            *(int(isinstance(uniforms, Tensor)), int(settles)),
            **_of_requests(),
        )
        if left is not None:
            _leave(source, known, left, draws_2BM)
        draw(source, known, uniforms, draws_2BM, drawn, left)
        if is_certain is not False:
            compare[(programs,)](
                *(*given, drawn.token_ids_BL, is_draft_BL, num_committed_B, *numbers, int(settles)),
                **_of_requests(),
            )
    draft_probs_BK, target_probs_BK, coins_BK = probs_3BK
    probs_BL, low_BL, high_BL, mass_BL, uniforms_BL = drawn.figures_5BL[:, :, :width]
    return Verdict(
        token_ids_BL=drawn.token_ids_BL[:, :width],
        num_committed_B=num_committed_B,
        is_draft_BL=is_draft_BL[:, :width],
        behavior_logprobs_BL=probs_BL.log(),
        evidence=Evidence(
            by_position_B=certain_B,
            draft_probs_BK=draft_probs_BK,
            target_probs_BK=target_probs_BK,
            coins_BK=coins_BK,
            uniforms_BL=uniforms_BL,
            mass_BL=mass_BL,
            low_BL=low_BL,
            high_BL=high_BL,
        ),
        faults_BL=known.fault_BL[:, :width],
    )


def _leave(source: Source, known: Tiled, left: Left, draws_2BM: Tensor) -> None:
    (size, num_rows, vocab_size), shape = source.shape, shape_of(source.shape[2])
    num_tiles = shape.num_tiles(vocab_size)
    leave[triton.cdiv(size, shape.rows), num_tiles](
        *(*law_arguments(source, known), *law_arguments(left.source, left.tiled), draws_2BM, left.mass_BT),
        *(size, num_rows, left.source.shape[1], draws_2BM.shape[2], vocab_size, num_tiles),
        *(int(source.is_dense), int(left.source.is_dense)),
        **_of_tiles(shape, source.is_wide),
    )


@lru_cache(maxsize=64)
def _flags(size: int, flag: bool, device: torch.device) -> Tensor:
    """The same of all requests, bool (B,): made once."""
    return torch.full((size,), flag, device=device)


def _of_requests() -> dict[str, Any]:
    return {"N": _REQUESTS, "D": _DRAFTS, "num_warps": 4}


def _of_tiles(shape: Shape, is_wide: bool) -> dict[str, Any]:
    return {"N": shape.rows, "W": shape.width, "num_warps": 16 if is_wide else 8}


def builds() -> Iterator[Build]:
    """Every way in which these kernels ship."""
    yield build(judge, "judge", "fp32", _of_requests())
    yield build(compare, "compare", "fp32", _of_requests())
    for logits in LOGITS:
        yield build(leave, f"leave {logits}", logits, _of_tiles(SHAPE, logits == "fp64"))
