"""The correctness kit on draws and coins: what is right passes, a planted bug of each kind fails.

Shapes: B requests, N draws, K drafted tokens, V vocabulary.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from blockroll.kernels.rows.weights import inverse_cdf
from blockroll.samplers import draw_draft, step_uniforms
from blockroll.samplers.check import (
    PRODUCTION,
    Coin,
    Sampler,
    check_coins,
    check_draft_law,
    check_draws,
    check_redraw_uniforms,
    check_same_law,
    check_stratified,
    check_tokens,
    redraw_uniforms,
)
from blockroll.types import Draft
from tests.law.mutants import MUTANTS, draws_from_bfloat16
from tests.law.toys import rows


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
        return Draft(token_ids_BK=tokens_K[None], law=laws_KV[None], num_drafts_B=torch.tensor([3]))

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
