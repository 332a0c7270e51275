"""The correctness kit: every check passes what is right, and fails a planted bug of the kind it is for.

Shapes: B requests, N draws, K drafted tokens, L = K + 1 target positions, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from blockroll.samplers import draw_draft, step_uniforms, verify_block
from blockroll.samplers.check import (
    PRODUCTION,
    Arithmetic,
    Coin,
    Sampler,
    arithmetic_of,
    check_closed_form,
    check_coins,
    check_draft_law,
    check_draws,
    check_logprobs,
    check_redraw_uniforms,
    check_rows,
    check_same_law,
    check_sampler,
    check_stratified,
    check_tokens,
    redraw_uniforms,
)
from blockroll.samplers.lossless import inverse_cdf
from blockroll.types import Draft, Verdict
from tests.law.mutants import MUTANTS
from tests.law.toys import TOYS

REAL_SIZES = [32_000, 151_936]


def rows(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draft logits (V,) and target logits (2, V), as far apart as a fair draft is from its target."""
    generator = torch.Generator().manual_seed(seed)
    target_LV = 2 * torch.randn(2, size, generator=generator)
    return target_LV[0] + 0.7 * torch.randn(size, generator=generator), target_LV


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
    return replace(draft, probs_BKV=logits_BKV.double().softmax(-1))


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
def test_production_is_within_1e_5_of_the_target_in_closed_form_at_real_vocabularies(size, temperature):
    draft_V, target_LV = rows(size)
    arithmetic = arithmetic_of(PRODUCTION, draft_V, target_LV[0], temperature=temperature)
    finding = check_closed_form(arithmetic, target_LV[0], temperature=temperature)
    assert finding.passed, str(finding)
    assert finding.statistic < 1e-11


def replaces_the_residual(draft: Draft, target_BLV: Tensor, uniforms_BL: Tensor) -> Verdict:
    """A verify step of its own for one request, which redraws from the target."""
    p_K = target_BLV[0, :-1].take_along_dim(draft.token_ids_BK[0, :, None], -1)[:, 0]
    q_K = draft.probs_BKV[0].take_along_dim(draft.token_ids_BK[0, :, None], -1)[:, 0]
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


def draws_from_bfloat16(logits_BKV: Tensor, temperature_B: Tensor, uniforms_BK: Tensor) -> Draft:
    """Draws from rounded logits, and returns the law of the others."""
    drawn = draw_draft(logits_BKV.bfloat16().float(), temperature_B, uniforms_BK)
    return replace(drawn, probs_BKV=logits_BKV.double().softmax(-1))


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


def drawn(law_V: Tensor, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return inverse_cdf(law_V.double(), torch.rand(count, dtype=torch.float64, generator=generator))


def test_draws_of_the_claimed_law_pass_and_the_stated_size_is_found_as_often_as_stated():
    law_V = torch.tensor(np.random.default_rng(1).dirichlet(np.ones(40)))
    right = [check_draws(drawn(law_V, 4000, seed), law_V) for seed in range(60)]
    assert all(finding.passed for finding in right)
    # Half of the cells up and half down by one share; the pooled ones stay as they are.
    counted_V = torch.where(law_V * 4000 >= 20, law_V, 0.0)
    sign_V = torch.where(counted_V.cumsum(0) < counted_V.sum() / 2, 1.0, -1.0) * (counted_V > 0)
    wrong_V = law_V * (1 + 2 * right[0].detectable * sign_V)
    wrong_V = wrong_V / wrong_V.sum()
    found = [not check_draws(drawn(wrong_V, 4000, seed), law_V).passed for seed in range(60)]
    assert sum(found) >= 57


def test_a_draw_without_probability_fails_and_texts_are_outcomes_too():
    law = {("a", "b"): 0.5, ("b",): 0.25, ("c",): 0.25}
    texts = [("a", "b")] * 52 + [("b",)] * 24 + [("c",)] * 24
    assert check_draws(texts, law).passed
    finding = check_draws([*texts, ("d",)], law)
    assert finding.statistic == float("inf")
    assert finding.found.startswith("1 of 101 draws have no probability")


def test_two_samples_of_one_law_pass_and_of_two_laws_fail():
    law_V = torch.tensor([0.4, 0.3, 0.2, 0.05, 0.05])
    texts = [drawn(law_V, count, seed).tolist() for seed, count in enumerate((3000, 5000))]
    assert check_same_law(*texts).passed
    finding = check_same_law(texts[0], drawn(law_V**0.7 / (law_V**0.7).sum(), 5000, 2).tolist())
    assert not finding.passed
    assert 0.02 < finding.detectable < 0.1


def varied_laws(count: int, size: int = 12) -> Tensor:
    """A law per draw, no two alike."""
    return (1.5 * torch.randn(count, size, generator=torch.Generator().manual_seed(2))).double().softmax(-1)


def drawn_each(laws_NV: Tensor, seed: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return inverse_cdf(laws_NV, torch.rand(len(laws_NV), dtype=torch.float64, generator=generator))


def only_the_best(laws_NV: Tensor, count: int) -> Tensor:
    best = laws_NV.topk(count).indices
    kept_NV = torch.zeros_like(laws_NV).scatter(-1, best, laws_NV.gather(-1, best))
    return kept_NV / kept_NV.sum(-1, keepdim=True)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "greedy": lambda laws: only_the_best(laws, 1),
    "truncated": lambda laws: only_the_best(laws, 8),
    "colder": lambda laws: laws.pow(1.3) / laws.pow(1.3).sum(-1, keepdim=True),
    "hotter": lambda laws: laws.pow(0.7) / laws.pow(0.7).sum(-1, keepdim=True),
}


def test_tokens_that_each_have_a_law_of_their_own_pass():
    laws_NV = varied_laws(4000)
    finding = check_tokens(drawn_each(laws_NV), laws_NV)
    assert finding.passed, str(finding)
    assert finding.detectable < 0.07


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_tokens_of_another_law_than_the_one_that_comes_with_them_fail(change):
    laws_NV = varied_laws(4000)
    assert not check_tokens(drawn_each(change(laws_NV)), laws_NV).passed


def test_a_lean_towards_the_draft_shows_in_the_order_of_that_lean_first():
    laws_NV, drafts_NV = varied_laws(4000), varied_laws(4000).roll(1, dims=0)
    leaning = drawn_each(0.92 * laws_NV + 0.08 * drafts_NV)
    ordered, unordered = (check_tokens(leaning, laws_NV, towards_NV=towards) for towards in (drafts_NV, None))
    assert not ordered.passed
    assert ordered.statistic > unordered.statistic
    assert check_tokens(drawn_each(laws_NV), laws_NV, towards_NV=drafts_NV).passed


def drafter(change: Callable[[Tensor], Tensor]) -> Callable[[int], Draft]:
    """Draws 3 drafts from the changed law and returns the other; one more is there, but not drafted."""

    def draft(call: int) -> Draft:
        laws_KV = varied_laws(400)[3 * call % 396 :][:4]
        tokens_K = drawn_each(change(laws_KV), seed=call)
        return Draft(token_ids_BK=tokens_K[None], probs_BKV=laws_KV[None], num_drafts_B=torch.tensor([3]))

    return draft


def test_a_returned_draft_law_passes_if_it_is_the_law_drawn_from():
    assert check_draft_law(drafter(lambda laws: laws), 500).passed
    assert check_draft_law(
        lambda call: draw_draft(
            torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(call)),
            torch.tensor([0.7, 0.0]),
            step_uniforms(torch.tensor([call, -call]), torch.zeros(2).long(), torch.zeros(2).long(), 4)[0],
        ),
        200,
    ).passed


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_returned_draft_law_fails_if_drafts_came_from_another(change):
    assert not check_draft_law(drafter(change), 1200).passed


def test_a_draft_from_rounded_logits_shows_in_stratified_counts():
    draft_V, _ = rows(600)

    def draws(draw: Callable[..., Draft]) -> Callable[[Tensor], Tensor]:
        one = torch.ones(1)
        return lambda u: draw(draft_V.expand(len(u), 1, -1), one.expand(len(u)), u[:, None]).token_ids_BK[
            :, 0
        ]

    claimed_V = draft_V.double().softmax(-1)
    assert check_stratified(draws(draw_draft), claimed_V, num_uniforms=6000, rows_per_call=1000).passed
    assert not check_stratified(
        draws(draws_from_bfloat16), claimed_V, num_uniforms=6000, rows_per_call=1000
    ).passed


def coins_of_a_run(*, advance: bool = True, seed_per_step: int | None = None, bits: int = 52) -> list[Coin]:
    """300 steps of one request under production's uniforms; half of the drafts are rejected."""
    generator, coins, position = torch.Generator().manual_seed(5), [], 10
    for step in range(300):
        attempt = step if advance else 0
        seed = torch.tensor([11 if seed_per_step is None else seed_per_step])
        place = position if seed_per_step is None else 0
        drafts, verify = step_uniforms(seed, torch.tensor([place]), torch.tensor([attempt]), 4)
        values = [*drafts[0].tolist(), *verify[0].tolist()]
        uses = [*((i, "draft") for i in range(4)), *((i, "accept") for i in range(4)), (4, "final")]
        for (offset, purpose), value in zip(uses, values, strict=True):
            coins.append(Coin("r", position + offset, purpose, step, int(value * 2**bits) / 2**bits))
        position += 1 + int(torch.randint(0, 3, (), generator=generator))
    return coins


def test_every_coin_of_production_serves_once():
    finding = check_coins(coins_of_a_run())
    assert finding.passed
    assert finding.threshold == 0


@pytest.mark.parametrize(
    "coins",
    [
        coins_of_a_run(advance=False),  # a position that is drafted again meets the same coins
        coins_of_a_run(advance=False, seed_per_step=1234),  # as if seeded anew at every step
        [
            *coins_of_a_run(),
            Coin("s", 3, "final", 0, coins_of_a_run()[70].value),
        ],  # one shared by two requests
    ],
)
def test_a_coin_that_serves_twice_is_named_with_both_its_uses(coins):
    finding = check_coins(coins)
    assert not finding.passed
    assert "such as (r, position" in finding.found


def test_coins_of_few_bits_may_meet_by_chance_and_no_oftener():
    coins = coins_of_a_run(bits=20)
    assert check_coins(coins).statistic > 0
    assert check_coins(coins, bits=20).passed
    again = [coin._replace(request="s") for coin in coins[:30]]
    assert not check_coins([*coins, *again], bits=20).passed


def redraws(sampler: Sampler, count: int = 4000) -> tuple[Tensor, Tensor]:
    """Final uniforms and redrawn tokens of the rejected, among so many requests with one draft each."""
    draft_V, target_LV = rows(40)
    generator = torch.Generator().manual_seed(6)
    uniforms_N3 = torch.rand(count, 3, dtype=torch.float64, generator=generator)
    draft = draw_draft(draft_V.expand(count, 1, -1), torch.ones(count), uniforms_N3[:, :1])
    target_LV = target_LV.double().softmax(-1)
    verdict = sampler.verify_block(draft, target_LV.expand(count, -1, -1), uniforms_N3[:, 1:])
    is_rejected = verdict.num_committed_B == 1
    return uniforms_N3[is_rejected, 2], verdict.token_ids_BL[is_rejected, 0]


def redraw_laws(count: int) -> tuple[Tensor, Tensor]:
    draft_V, target_LV = rows(40)
    laws = (target_LV[0].double().softmax(-1), draft_V.double().softmax(-1))
    return laws[0].expand(count, -1), laws[1].expand(count, -1)


def test_redraw_uniforms_of_production_are_uniform_given_the_rejection_known_or_worked_out():
    uniforms, tokens = redraws(PRODUCTION)
    assert len(uniforms) > 500
    assert check_redraw_uniforms(uniforms).passed
    worked_out = redraw_uniforms(tokens, *redraw_laws(len(tokens)))
    assert check_redraw_uniforms(worked_out).passed
    # The token's own interval is known, the place inside it is not.
    assert (worked_out - uniforms).abs().max() < 0.5


@pytest.mark.parametrize(("name", "statistic"), [("coin_reused", 0.3), ("final_from_target", float("inf"))])
def test_a_redraw_by_the_coin_that_rejected_or_from_the_target_fails(name, statistic):
    _, tokens = redraws(MUTANTS[name])
    finding = check_redraw_uniforms(redraw_uniforms(tokens, *redraw_laws(len(tokens))))
    assert not finding.passed
    assert finding.statistic >= statistic
