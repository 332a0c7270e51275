"""The correctness kit: every check passes what is right, and fails a planted bug of the kind it is for.

Shapes: B requests, N draws, K drafted tokens, L = K + 1 target positions, V vocabulary.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from blockroll.kernels.rows import logit_rows
from blockroll.kernels.rows.weights import inverse_cdf
from blockroll.samplers import draft_probs, draw_draft, verify_block
from blockroll.samplers.check import (
    PRODUCTION,
    Arithmetic,
    Sampler,
    arithmetic_of,
    check_closed_form,
    check_logprobs,
    check_rows,
    check_sampler,
    check_stratified,
)
from blockroll.types import Draft, Verdict
from tests.law.mutants import MUTANTS, draws_from_bfloat16
from tests.law.toys import TOYS, rows

REAL_SIZES = [32_000, 151_936]


def extra_from_the_row_before(draft: Draft, target_BLV: Tensor, uniforms_BL: Tensor) -> Verdict:
    """Off by one: whatever is drawn after the drafts comes from the row of the last draft."""
    if target_BLV.shape[1] == 1:
        return verify_block(draft, target_BLV, uniforms_BL)
    return verify_block(draft, torch.cat([target_BLV[:, :-1], target_BLV[:, -2:-1]], dim=1), uniforms_BL)


def commits_one_too_many(draft: Draft, target_BLV: Tensor, uniforms_BL: Tensor) -> Verdict:
    verdict = verify_block(draft, target_BLV, uniforms_BL)
    return replace(verdict, num_committed_B=(verdict.num_committed_B + 1).clamp(max=uniforms_BL.shape[1]))


def last_id_if_nothing_is_left(draft: Draft, target_BLV: Tensor, uniforms_BL: Tensor) -> Verdict:
    """The degenerate residual resolved to V - 1, as other engines did."""
    verdict = verify_block(draft, target_BLV, uniforms_BL)
    is_rejected = uniforms_BL[:, :1] >= 1
    if draft.token_ids_BK.shape[1] == 0 or not is_rejected.any():
        return verdict
    last = target_BLV.shape[-1] - 1
    return replace(verdict, token_ids_BL=torch.where(is_rejected, last, verdict.token_ids_BL))


def reports_the_draft_law(draft: Draft, target_BLV: Tensor, uniforms_BL: Tensor) -> Verdict:
    verdict = verify_block(draft, target_BLV, uniforms_BL)
    return replace(verdict, behavior_logprobs_BL=verdict.behavior_logprobs_BL + 1e-9)


def forgets_the_temperature(logits_BKV: Tensor, temperature_B: Tensor, uniforms_BK: Tensor) -> Draft:
    """Draws at the temperature and returns the law at 1."""
    draft = draw_draft(logits_BKV, temperature_B, uniforms_BK)
    return replace(draft, law=logits_BKV.double().softmax(-1))


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
@pytest.mark.parametrize("num_drafts", [0, 1, 2])
def test_production_passes_on_every_table(toy, num_drafts):
    for check in (check_sampler, check_logprobs):
        finding = check(PRODUCTION, toy, num_drafts)
        assert finding.passed, str(finding)


def test_production_passes_over_two_steps():
    assert check_sampler(PRODUCTION, TOYS["stochastic"], 1, num_steps=2, length=4).passed


@pytest.mark.parametrize(
    "sampler",
    [
        *MUTANTS.values(),
        Sampler(draw_draft, extra_from_the_row_before),
        Sampler(draw_draft, commits_one_too_many),
        Sampler(forgets_the_temperature, verify_block),
    ],
)
def test_a_planted_bug_fails_on_a_table(sampler):
    finding = check_sampler(sampler, TOYS["hot"], 2)
    assert not finding.passed
    assert finding.statistic > 1e-3
    assert "by the target it is" in finding.found


def test_a_table_on_which_the_coin_is_shared_is_split_for_it():
    assert not check_sampler(MUTANTS["coin_reused"], TOYS["opposite"], 1, is_coin_shared=True).passed
    assert check_sampler(PRODUCTION, TOYS["opposite"], 1, is_coin_shared=True).passed


def test_a_logprob_that_is_not_of_the_law_drawn_from_fails():
    finding = check_logprobs(Sampler(draw_draft, reports_the_draft_law), TOYS["stochastic"], 2)
    assert finding.statistic == pytest.approx(1e-9, rel=1e-3)
    assert not finding.passed


@pytest.mark.parametrize(
    ("size", "num_uniforms"), [(7, 999), (600, 4001), *((size, 200) for size in REAL_SIZES)]
)
def test_stratified_uniforms_give_production_its_exact_counts_on_every_kind_of_row(size, num_uniforms):
    findings = check_rows(PRODUCTION, *rows(size), num_uniforms=num_uniforms)
    assert len(findings) == 6
    assert all(finding.passed for finding in findings), [str(finding) for finding in findings]


@pytest.mark.parametrize(
    ("sampler", "broken"),
    [
        (
            Sampler(forgets_the_temperature, verify_block),
            set(),
        ),  # its tokens are right: check_draft_law is for it
        (MUTANTS["final_from_target"], {"residual"}),
        (MUTANTS["accept_if_target_is_larger"], {"accept", "degenerate"}),
        (MUTANTS["coin_reused"], {"residual", "extra", "degenerate"}),
        (Sampler(draw_draft, extra_from_the_row_before), {"extra"}),
        (Sampler(draw_draft, commits_one_too_many), {"accept", "residual", "degenerate"}),
        (Sampler(draw_draft, last_id_if_nothing_is_left), {"degenerate"}),
    ],
)
def test_a_planted_bug_fails_on_the_rows_it_touches_and_on_no_other(sampler, broken):
    findings = check_rows(sampler, *rows(600), num_uniforms=3000, temperature=0.8)
    assert {finding.check.split()[2] for finding in findings if not finding.passed} == broken


def test_a_tail_cut_off_shows_through_a_window_that_is_as_narrow_as_the_tail():
    weights_V = torch.cat([torch.ones(1), torch.full((1000,), 1e-9)]).double()
    law_V, cut_V = weights_V / weights_V.sum(), torch.where(weights_V < 1e-8, 0.0, weights_V)
    tail = (float(law_V[0]), 1.0)
    assert check_stratified(lambda u: inverse_cdf(law_V, u), law_V, num_uniforms=5000, window=tail).passed
    assert not check_stratified(lambda u: inverse_cdf(cut_V, u), law_V, num_uniforms=5000, window=tail).passed
    # The whole of (0, 1) at once has no uniform in the tail.
    assert check_stratified(lambda u: inverse_cdf(cut_V, u), law_V, num_uniforms=5000).passed


def test_an_id_outside_the_vocabulary_or_without_probability_fails_whatever_its_count():
    law_V = torch.tensor([0.5, 0.5, 0.0])
    outside = check_stratified(lambda u: inverse_cdf(law_V.double(), u) * 4, law_V, num_uniforms=10)
    impossible = check_stratified(
        lambda u: torch.where(u > 0.99, 2, (u > 0.5).long()), law_V, num_uniforms=100
    )
    assert outside.statistic == impossible.statistic == float("inf")
    assert "outside the vocabulary of 3" in outside.found


@pytest.mark.parametrize("size", REAL_SIZES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_production_is_within_1e_5_of_the_target_in_closed_form_at_real_vocabularies(
    monkeypatch, size, temperature
):
    """Of the torch code, which can be watched; compiled code is compared with it, and drawn from above."""
    monkeypatch.setattr(logit_rows, "rows_library", lambda: None)
    draft_V, target_LV = rows(size)
    arithmetic = arithmetic_of(PRODUCTION, draft_V, target_LV[0], temperature=temperature)
    finding = check_closed_form(arithmetic, target_LV[0], temperature=temperature)
    assert finding.passed, str(finding)
    assert finding.statistic < 1e-11


def replaces_the_residual(draft: Draft, target_BLV: Tensor, uniforms_BL: Tensor) -> Verdict:
    """A verify step of its own for one request, which redraws from the target."""
    p_K = target_BLV[0, :-1].take_along_dim(draft.token_ids_BK[0, :, None], -1)[:, 0]
    q_K = draft_probs(draft, target_BLV.shape[-1])[0].take_along_dim(draft.token_ids_BK[0, :, None], -1)[:, 0]
    num_accepted = int((uniforms_BL[0, :-1] <= p_K / q_K).long().cumprod(0).sum())
    final = inverse_cdf(target_BLV[0, num_accepted], uniforms_BL[0, -1])
    tokens_L = torch.cat([draft.token_ids_BK[0, :num_accepted], final[None]])
    return Verdict(
        token_ids_BL=tokens_L[None],
        num_committed_B=torch.tensor([num_accepted + 1]),
        is_draft_BL=torch.arange(num_accepted + 1)[None] < num_accepted,
        behavior_logprobs_BL=torch.zeros(1, num_accepted + 1),
    )


def test_the_arithmetic_seen_is_that_of_the_sampler_and_not_a_second_one():
    draft_V, target_LV = rows(50)
    right = arithmetic_of(PRODUCTION, draft_V, target_LV[0])
    p_V, q_V = target_LV[0].double().softmax(-1), draft_V.double().softmax(-1)
    assert torch.allclose(right.accept_V, (p_V / q_V).clamp(max=1), rtol=0, atol=1e-14)
    broken = arithmetic_of(Sampler(draw_draft, replaces_the_residual), draft_V, target_LV[0])
    assert torch.allclose(broken.accept_V, right.accept_V, rtol=0, atol=1e-14)
    assert check_closed_form(broken, target_LV[0]).statistic > 0.05
    drafts_wrongly = arithmetic_of(Sampler(draws_from_bfloat16, verify_block), draft_V, target_LV[0])
    assert check_closed_form(drafts_wrongly, target_LV[0]).statistic > 1e-4


def biased(name: str, draft_V: Tensor, target_V: Tensor) -> Arithmetic:
    """The arithmetic of a sampler with one known fault, in float64 otherwise."""
    p_V, q_V = target_V.double().softmax(-1), draft_V.double().softmax(-1)
    drawn_V, residual_V = q_V, (p_V - q_V).clamp(min=0)
    if name == "target logits in bfloat16":
        p_V = target_V.bfloat16().double().softmax(-1)
        residual_V = (p_V - q_V).clamp(min=0)
    if name == "draft drawn from bfloat16":
        drawn_V = draft_V.bfloat16().double().softmax(-1)
    if name == "floor in the residual":
        residual_V = residual_V.clamp(min=1e-6)
    if name == "residual replaced":
        residual_V = p_V
    if name == "draft drawn from the 20 best":
        best = draft_V.topk(20).indices
        drawn_V = torch.zeros_like(q_V).scatter(0, best, draft_V[best].double().softmax(-1))
    return Arithmetic(
        draft_cumulative_V=drawn_V.cumsum(-1),
        accept_V=(p_V / q_V).clamp(max=1),
        final_cumulative_V=residual_V.cumsum(-1),
    )


@pytest.mark.failure(93)
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("target logits in bfloat16", 2.8e-3),
        ("draft drawn from bfloat16", 2.4e-3),
        ("floor in the residual", 1.6e-2),
        ("residual replaced", 0.12),
        ("draft drawn from the 20 best", 0.58),
    ],
)
def test_known_faults_of_samplers_have_their_known_size(name, size):
    """V = 32000, Gaussian logits with deviation 2, and draft = target + 0.7 noise."""
    draft_V, target_LV = rows(32_000)
    finding = check_closed_form(biased(name, draft_V, target_LV[0]), target_LV[0])
    assert not finding.passed
    assert finding.statistic == pytest.approx(size, rel=0.2)
