"""Bugs of other engines' samplers, each as a check of our kernels and as a line of them that has the bug.

The numbers are those of docs/failures.md. Checks raise AssertionError where the bug is.
Shapes: B requests, N uniforms, K drafted tokens, L = K + 1 target positions, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from blockroll.kernels import block_verify, draft_draw
from blockroll.kernels.rows import Cut, LogitRows
from blockroll.samplers import step_coins
from blockroll.samplers.check import PRODUCTION, stratified
from blockroll.samplers.check.exact import check_logprobs
from blockroll.types import POINT_MASS, Draft, RowFault
from tests.law.integrate import committed_law, max_difference, target_law
from tests.law.known_failures import LARGEST, P
from tests.law.toys import TOYS
from tests.numerics.rows_by_hand import NUM_DRAFTS, SIZE, coins
from tests.numerics.verdicts_by_hand import assert_told, draft_of, target_of


class Failure(NamedTuple):
    """A module of kernels, and which piece of it is replaced by which."""

    check: Callable[[], None]
    module: str
    right: str
    wrong: str


FAILURES: dict[int, Failure] = {}


def failure(number: int, module: str, right: str, wrong: str):
    def register(check: Callable[[], None]) -> Callable[[], None]:
        FAILURES[number] = Failure(check, module, right, wrong)
        return check

    return register


def assert_law(toy: str, num_drafts: int, *, is_coin_shared: bool = False) -> None:
    law = committed_law(PRODUCTION, TOYS[toy], [num_drafts], num_drafts + 1, is_coin_shared=is_coin_shared)
    assert max_difference(law, target_law(TOYS[toy], num_drafts + 1)) < 1e-12


def plain(logits_BV: torch.Tensor, uniforms_B: torch.Tensor, cut: Cut | None = None, scale: float = 1.0):
    """A step without drafts of rows (B, V) at a temperature."""
    no_tokens_B0 = torch.zeros((len(logits_BV), 0), dtype=torch.int64)
    none = Draft(token_ids_BK=no_tokens_B0, law=POINT_MASS, num_drafts_B=no_tokens_B0.sum(dim=1))
    temperature_B = torch.full((len(logits_BV),), scale, dtype=torch.float64)
    rows = LogitRows(logits_BV[:, None], temperature_B, scale == 0, cut)
    return block_verify.verify_block(none, rows, uniforms_B[:, None])


@failure(
    28,
    "block_verify.fused",
    "tl.store(PROBS + out_ND, p_ND, mask=is_kept_ND)",
    "tl.store(PROBS + out_ND, q_ND, mask=is_kept_ND)",
)
def logprobs_are_those_of_the_row_that_a_token_was_drawn_from():
    assert check_logprobs(PRODUCTION, TOYS["stochastic"], 1).passed


@failure(
    33,
    "draft_draw.fused",
    "law = replace(rows, known=Known(out.token_ids_BL, out.figures_5BL[0]), tiled=known)",
    "law = replace(rows, temperature_B=rows.temperature_B * 0 + 1)",
)
def the_draft_law_returned_is_the_law_drawn_from():
    assert_law("hot", 1)


@failure(
    34,
    "draft_draw.fused",
    "source = source_of(rows, num_drafts_B)",
    "source = source_of(replace(rows, logits_BLV=rows.logits_BLV.bfloat16().float()), num_drafts_B)",
)
def drafts_are_drawn_from_the_logits_that_score_them():
    """On either side of where one token's interval ends and the next one's begins."""
    logits_V = 3 * torch.randn(64, generator=torch.Generator().manual_seed(3))
    edges = logits_V.double().softmax(-1).cumsum(0)[:-1]
    uniforms_N = torch.cat([edges - 1e-6, edges + 1e-6])
    likely = (edges.diff(append=edges[-1:] + 1) > 1e-5) & (edges.diff(prepend=edges[:1] * 0) > 1e-5)
    draft = draft_draw.draw_draft(
        logits_V.expand(len(uniforms_N), 1, -1), torch.ones(len(uniforms_N)), uniforms_N[:, None]
    )
    drawn_2E = draft.token_ids_BK.view(2, -1)
    assert torch.equal(drawn_2E[0][likely], torch.arange(63)[likely])
    assert torch.equal(drawn_2E[1][likely], torch.arange(1, 64)[likely])


@failure(35, "rows.fused_draw", "tl.where(q == q, tl.maximum(p - q, 0.0), p)", "tl.where(q == q, p, p)")
def a_rejected_position_is_redrawn_from_the_residual():
    assert_law("opposite", 1)


@failure(
    37,
    "draft_draw.fused",
    "law=POINT_MASS if certain is True else law",
    "law=replace(rows, temperature_B=rows.temperature_B * 0 + 1, has_greedy=False)",
)
def greedy_drafts_are_point_masses():
    assert_law("argmax_draft", 1)


@failure(
    38,
    "rows.fused_cut",
    "is_cut = is_warm &",
    "is_cut = (cell % num_rows == num_rows - 1) & is_warm &",
)
def truncation_reaches_accepted_and_redrawn_tokens():
    target = target_of(63, "cut")
    draft, uniforms_BL = draft_of(target, "drawn"), coins(SIZE, NUM_DRAFTS + 1)
    assert_told(block_verify.verify_block(draft, target, uniforms_BL), draft, target, uniforms_BL)


@failure(
    39,
    "rows.fused_draw",
    "is_hit_NX = (until_NX > goal_N[:, None]) & (mass_NX > 0)",
    "is_hit_NX = mass_NX == tl.max(mass_NX, 1)[:, None]",
)
def at_temperature_one_tokens_are_not_the_best_ones():
    assert_law("stochastic", 0)


def spoiled(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.clone()
    rows[1, 0, 3] = math.nan
    return rows


@failure(
    40,
    "rows.fused_laws",
    "tl.max(is_bad_NW.to(tl.int32), 1)",
    "tl.max(is_bad_NW.to(tl.int32), 1) * 0",
)
def draft_rows_that_are_not_finite_are_told_of():
    rows = spoiled(torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(0)))
    draft = draft_draw.draw_draft(rows, torch.ones(3), coins(3, 2))
    assert (draft.faults_BK == RowFault.NOT_FINITE).any(dim=1).tolist() == [False, True, False]


@failure(41, "rows.fused_laws", "fault_N = tl.max(fault_NT, 1)", "fault_N = tl.max(fault_NT, 1) * 0")
def target_rows_that_are_not_finite_are_told_of_and_give_ids_of_the_vocabulary():
    rows = spoiled(torch.randn(3, 1, 9, generator=torch.Generator().manual_seed(0)))
    rows[2] = math.nan
    verdict = plain(rows[:, 0], coins(3))
    assert verdict.faults_BL[:, 0].tolist() == [0, int(RowFault.NOT_FINITE), int(RowFault.NOT_FINITE)]
    assert ((verdict.token_ids_BL >= 0) & (verdict.token_ids_BL < 9)).all()


@failure(42, "rows.fused_draw", "(ids_NC < vocab)", "(ids_NC < vocab + 3)")
def no_id_lies_outside_the_vocabulary():
    uniforms_N = torch.tensor([2.0**-53, 0.5, LARGEST], dtype=torch.float64)
    for size in (1, 511, 4_095, 4_097):
        memory = torch.zeros(4, size + 8)
        verdict = plain(memory[:3, :size], uniforms_N)
        tokens = verdict.token_ids_BL[:, 0].tolist()
        assert (tokens[0], tokens[2]) == (0, size - 1)
        assert verdict.evidence.high_BL.max() <= 1 + 1e-12


@triton.jit
def uniforms_of_words(HIGH, LOW, OUT, u52_of: tl.constexpr):
    place = tl.arange(0, 4)
    words = tl.load(HIGH + place).to(tl.uint32), tl.load(LOW + place).to(tl.uint32)
    tl.store(OUT + place, u52_of(words[0], words[1]))


@failure(
    43,
    "rows.fused_reading",
    "word = (high.to(tl.int64) << 20) | (low.to(tl.int64) >> 12)\n    return (word.to(tl.float64) + 0.5) * "
    "2.220446049250313e-16",
    "word = (high.to(tl.int64) << 21) | (low.to(tl.int64) >> 11)\n    return (word.to(tl.float64) + 0.5) * "
    "1.1102230246251565e-16",
)
def uniforms_lie_strictly_between_zero_and_one():
    words, out = torch.tensor([0, 0xFFFFFFFF, 0xFFFFFFFF, 1]), torch.empty(4, dtype=torch.float64)
    uniforms_of_words[(1,)](words, words, out, block_verify.fused.uniform_of.fn.__globals__["u52_of"])
    assert ((out > 0) & (out < 1)).all()


@failure(
    44, "rows.fused_cut", "is_last_C = is_tie_C & (order_C == rank)", "is_last_C = is_tie_C & (order_C < 0)"
)
def of_equal_tokens_at_the_edge_the_lowest_ids_stay():
    uniforms_N = stratified(20)
    cut = Cut(*torch.tensor([[2.0], [1], [0]], dtype=torch.float64).expand(3, 20))
    verdict = plain(torch.tensor([0.1, 2, 1, 1, 1]).expand(20, -1), uniforms_N, cut)
    assert verdict.token_ids_BL.unique().tolist() == [1, 2]


@failure(
    45, "rows.fused_draw", "is_left_N & (tl.sum(left_NT, 1) > 0)", "is_left_N & (tl.sum(left_NT, 1) > -1)"
)
def a_rejection_that_rounding_made_draws_from_the_target():
    count, law = 40, torch.tensor(P, dtype=torch.float64)
    draft = Draft(
        token_ids_BK=torch.zeros((count, 1), dtype=torch.int64),
        law=law.expand(count, 1, -1),
        num_drafts_B=torch.ones(count, dtype=torch.int64),
    )
    uniforms_B2 = torch.stack([torch.full((count,), 1.5, dtype=torch.float64), stratified(count)], dim=1)
    tokens = block_verify.verify_block(draft, law.expand(count, 2, -1), uniforms_B2).token_ids_BL[:, 0]
    assert ((torch.bincount(tokens, minlength=4) - count * law).abs() <= 1).all()


def words_of_a_step(attempt: int = 4) -> list[float]:
    """Every uniform that a step's kernels drew for two requests of two seeds, of rejected drafts."""
    given = (torch.tensor([5, 6]), torch.tensor([10, 10]), torch.full((2,), attempt), 2)
    draft_coins, verify_coins = step_coins(*given)
    logits_BKV = torch.zeros(2, 2, 7)
    draft = draft_draw.draw_draft(logits_BKV, torch.ones(2), draft_coins)
    target_BLV = torch.zeros(2, 3, 7)
    target_BLV[0, 0, draft.token_ids_BK[0, 0]] = -50.0
    target_BLV[1, 1, draft.token_ids_BK[1, 1]] = -50.0
    evidence = block_verify.verify_block(
        draft, LogitRows(target_BLV, torch.ones(2).double(), False), verify_coins
    ).evidence
    seen = [evidence.coins_BK, evidence.uniforms_BL]
    return [u for each in seen for u in each[~each.isnan()].tolist()]


@failure(48, "rows.fused_reading", "c2 = tl.load(WORDS + plane", "c2 = 0 * tl.load(WORDS + plane")
def no_uniform_of_a_step_serves_twice():
    drafts, verify = step_coins(torch.tensor([5]), torch.tensor([10]), torch.tensor([4]), 1)
    used = words_of_a_step()
    assert len(set(used)) == len(used) == 6
    # The word of the draft's own draw is not the accept coin's: they differ in their purpose alone.
    assert drafts.uniforms()[0, 0].item() not in used
    assert verify.uniforms()[0, 0].item() in used


@failure(49, "block_verify.fused", "-num_columns, num_columns - 1)", "-num_columns + 1, num_columns - 2)")
def the_accept_coin_does_not_draw_what_replaces_its_draft():
    assert_law("stochastic", 1, is_coin_shared=True)


@failure(51, "rows.fused_reading", "c3 = tl.load(WORDS + 2 * plane", "c3 = 0 * tl.load(WORDS + 2 * plane")
def coins_differ_from_step_to_step():
    assert not {*words_of_a_step(4)} & {*words_of_a_step(5)}


@failure(53, "rows.fused_reading", "tl.load(SEEDS + request,", "tl.load(SEEDS + request * 0,")
def every_request_has_the_coins_of_its_own_seed():
    seeds_B = torch.tensor([11, -7, 12])
    coins_B1 = step_coins(seeds_B, torch.full((3,), 9), torch.zeros(3).long(), 0, by_position=True)[1]
    used = plain_by_coins(coins_B1)
    alone = [plain_by_coins(coins_B1[b : b + 1, :])[0] for b in range(3)]
    assert used == alone == coins_B1.uniforms()[:, 0].tolist()


def plain_by_coins(coins_B1) -> list[float]:
    size = coins_B1.shape[0]
    no_tokens_B0 = torch.zeros((size, 0), dtype=torch.int64)
    none = Draft(token_ids_BK=no_tokens_B0, law=POINT_MASS, num_drafts_B=no_tokens_B0.sum(dim=1))
    rows = LogitRows(torch.zeros(size, 1, 7), torch.ones(size).double(), False)
    return block_verify.verify_block(none, rows, coins_B1).evidence.uniforms_BL[:, 0].tolist()


@failure(
    56,
    "rows.fused_reading",
    "seed = tl.load(SEEDS + request, mask=is_on, other=0)",
    "seed = tl.load(SEEDS + request, mask=is_on, other=0) * 0",
)
def drafts_are_drawn_by_the_seed_of_their_request():
    seeds_B = torch.arange(40)
    drafts, _ = step_coins(seeds_B, torch.full((40,), 9), torch.zeros(40).long(), 1)
    rows = torch.zeros(40, 1, 50)
    found = draft_draw.draw_draft(rows, torch.ones(40), drafts).token_ids_BK[:, 0]
    assert torch.equal(found, (drafts.uniforms()[:, 0] * 50).long())


TAIL, GAP = 8_192, 20.5


def tail_tokens() -> tuple[list[int], list[float]]:
    """What evenly spaced uniforms draw from a tail of a likely token, and where its equal tokens put them."""
    logits_V = torch.full((TAIL + 1,), -GAP)
    logits_V[0] = 0
    first = 1 / (1 + TAIL * math.exp(-GAP))
    verdict = plain(logits_V.expand(6, -1), stratified(6, first, 1.0))
    return verdict.token_ids_BL[:, 0].tolist(), [TAIL * (i + 0.5) / 6 for i in range(6)]


def a_tail_beyond_24_bits_is_drawn_from_evenly():
    found, expected = tail_tokens()
    assert found == pytest.approx(expected, abs=2)


for number, piece in {
    86: (
        "rows.fused_reading",
        "tl.exp(-(gap * scale))",
        "tl.where(gap * scale > 16.6, 0.0, tl.exp(-(gap * scale)))",
    ),
    87: (
        "rows.fused_draw",
        "goal_N = u_N * whole_N",
        "goal_N = tl.floor(u_N * 16777216.0) / 16777216.0 * whole_N",
    ),
    88: (
        "rows.fused_draw",
        "until_NX = tl.cumsum(mass_NX, 1)",
        "until_NX = tl.cumsum(mass_NX.to(tl.float32), 1).to(tl.float64)",
    ),
}.items():
    failure(number, *piece)(a_tail_beyond_24_bits_is_drawn_from_evenly)
