"""Bugs of other engines' samplers, each as a check and as a planted bug.

Shapes: B requests, N uniforms, K drafted tokens, L = K + 1 target positions, V vocabulary.
"""

import dataclasses
import math

import pytest
import torch

from blockroll.errors import InvalidInput
from blockroll.kernels import block_verify, draft_draw
from blockroll.kernels.block_verify import reference
from blockroll.kernels.rows import Cut, logit_rows, truncation
from blockroll.kernels.rows.weights import Weights
from blockroll.rollout.engine import step as decoding
from blockroll.samplers import laws as laws_module
from blockroll.samplers import uniforms
from blockroll.samplers.laws import Laws
from blockroll.types import Draft, Plan, Sampling
from tests.engines import make_requests, run
from tests.law.engine_law import Processing, engine_law, processed_law
from tests.law.integrate import max_difference, target_law
from tests.law.known_failures import LARGEST, TWO_FORWARD, P, Q, failure, stratified
from tests.law.toys import TOYS
from tests.models import prompts, random_policy


def scores_drafts_by_their_softmax(monkeypatch):
    """At temperature 1, whatever temperature they were drawn at; at 0 a soft law is invented."""
    draw_draft = draft_draw.draw_draft

    def wrong(logits, temperature, uniforms_BK, num_drafts=None, **kwargs):
        draft = draw_draft(logits, temperature, uniforms_BK, num_drafts, **kwargs)
        return dataclasses.replace(draft, law=logits.double().softmax(-1))

    monkeypatch.setattr(laws_module, "draw_draft", wrong)


@failure(33, scores_drafts_by_their_softmax)
def the_draft_law_returned_is_the_law_drawn_from():
    for plan in (Plan(2), Plan(2, (0, 2))):
        law, _ = engine_law(TOYS["hot"], plan, length=3)
        assert max_difference(law, target_law(TOYS["hot"], 3)) < 1e-12


def draws_from_rounded_logits(monkeypatch):
    target_probs = logit_rows.target_probs

    def wrong(logits, temperature, uniforms_BK, num_drafts=None, **kwargs):
        tokens = logit_rows.inverse_cdf(target_probs(logits.bfloat16(), temperature), uniforms_BK)
        batch, width = uniforms_BK.shape
        return Draft(
            token_ids_BK=tokens,
            law=target_probs(logits, temperature),
            num_drafts_B=torch.full((batch,), width),
        )

    monkeypatch.setattr(draft_draw, "draw_draft", wrong)


@failure(34, draws_from_rounded_logits)
def drafts_are_drawn_from_the_logits_that_score_them():
    count = 100_000
    logits_V = 3 * torch.randn(64, generator=torch.Generator().manual_seed(3))
    draft = draft_draw.draw_draft(
        logits_V[None, None], torch.ones(1), torch.full((1, 1), 0.5, dtype=torch.float64)
    )
    tokens = draft_draw.draw_draft(
        logits_V.expand(count, 1, -1), torch.ones(count), stratified(count)[:, None]
    ).token_ids_BK
    counts = torch.bincount(tokens.flatten(), minlength=64)
    assert ((counts - count * draft_draw.draft_probs(draft, len(logits_V))[0, 0]).abs() <= 1).all()


def fixture_law(verify) -> torch.Tensor:
    """The law of one token of the fixture: a coin on either side of each threshold, stratified redraws."""
    count, law = 1000, torch.zeros(4, dtype=torch.float64)
    target = torch.tensor([[P, P]], dtype=torch.float64).expand(count, -1, -1)
    for drafted in range(4):
        draft = Draft(
            token_ids_BK=torch.full((count, 1), drafted),
            law=torch.tensor([[Q]], dtype=torch.float64).expand(count, -1, -1),
            num_drafts_B=torch.ones(count, dtype=torch.int64),
        )
        accepted = min(1.0, P[drafted] / Q[drafted])
        for coin, share in ((accepted / 2, accepted), ((1 + accepted) / 2, 1 - accepted)):
            coins = torch.stack([torch.full((count,), coin, dtype=torch.float64), stratified(count)], dim=1)
            tokens = verify(draft, target, coins).token_ids_BL[:, 0]
            law += Q[drafted] * share * torch.bincount(tokens, minlength=4) / count
    return law


def redraws_from_the_target(monkeypatch):
    monkeypatch.setattr(reference, "_residual", lambda target, *_: target)


@failure(35, redraws_from_the_target)
def a_rejected_position_is_redrawn_from_the_residual():
    law = fixture_law(block_verify.verify_block)
    assert torch.allclose(law, torch.tensor(P, dtype=torch.float64), atol=2e-3)


def takes_missing_probabilities_for_a_point_mass(monkeypatch):
    def invent(draft):
        if draft.law is None:
            one_hot = torch.nn.functional.one_hot(draft.token_ids_BK, 4).double()
            object.__setattr__(draft, "law", one_hot)

    monkeypatch.setattr(Draft, "__post_init__", invent)


@failure(36, takes_missing_probabilities_for_a_point_mass)
def drafts_without_their_law_are_refused():
    with pytest.raises(InvalidInput, match="the law they were drawn from"):
        Draft(token_ids_BK=torch.zeros((1, 1), dtype=torch.int64), law=None, num_drafts_B=torch.ones(1))


@failure(37, scores_drafts_by_their_softmax)
def greedy_drafts_are_point_masses_and_the_weight_counts():
    toy = TOYS["argmax_draft"]
    lossless_law, _ = engine_law(toy, Plan(2), length=2)
    assert max_difference(lossless_law, target_law(toy, 2)) < 1e-12
    mixed_law, corrected = engine_law(toy, Plan(2), length=2, weight=0.5)
    assert max_difference(corrected, target_law(toy, 2)) < 1e-12
    assert max_difference(mixed_law, lossless_law) > 1e-2


def truncates_the_last_row_alone(monkeypatch):
    truncate = truncation.truncate

    def wrong(probs, *options):
        return torch.cat([probs[:, :-1], truncate(probs[:, -1:], *options)], dim=1)

    monkeypatch.setattr(logit_rows, "truncate", wrong)


@failure(38, truncates_the_last_row_alone)
def truncation_reaches_accepted_and_redrawn_tokens():
    """Edits of logits have planted versions of their own in test_processing.py."""
    processing = Processing(options={"min_p": 0.41})
    law, _ = engine_law(TOYS["stochastic"], Plan(2, (0, 2)), length=3, processing=processing)
    assert max_difference(law, processed_law(TOYS["stochastic"], processing, 3)) < 1e-12


def maps_what_is_not_finite_to_zero(monkeypatch):
    monkeypatch.setattr(decoding, "without_non_finite", lambda logits: (logits.nan_to_num(), None))


def spoiled(rows: str):
    """Rollouts of a policy whose draft or verify rows are NaN for one request of three."""
    policy = random_policy()
    original = getattr(policy, rows)

    def spoil(*arguments):
        setattr(policy, rows, original)  # the first step alone
        logits = original(*arguments).clone()
        logits[1] = math.nan
        return logits

    setattr(policy, rows, spoil)
    return run(policy, make_requests(prompts(3), Sampling(max_tokens=8)), TWO_FORWARD)


@failure(40, maps_what_is_not_finite_to_zero)
def draft_rows_that_are_not_finite_fail_their_request():
    rollouts = spoiled("draft_logits")
    assert rollouts["r1"].error is not None
    assert "draft logits hold NaN" in rollouts["r1"].error
    assert rollouts["r0"].error is None


@failure(41, maps_what_is_not_finite_to_zero)
def verify_rows_that_are_not_finite_fail_their_request():
    rollouts = spoiled("verify_logits")
    assert rollouts["r1"].error is not None
    assert "verify logits hold NaN" in rollouts["r1"].error
    assert rollouts["r1"].token_ids == ()
    assert rollouts["r2"].error is None


def forgets_to_mask_the_last_tile(monkeypatch):
    inverse_cdf = logit_rows.inverse_cdf

    def wrong(weights_V, coins):
        missing = -weights_V.shape[-1] % 1024
        return inverse_cdf(torch.nn.functional.pad(weights_V, (0, missing), value=0.1), coins)

    monkeypatch.setattr(logit_rows, "inverse_cdf", wrong)


@failure(42, forgets_to_mask_the_last_tile)
def no_id_lies_outside_the_vocabulary():
    for size in (8193, 10_000, 151_936):
        for num_padded in (0, 3):
            weights_V = torch.full((size,), 0.1, dtype=torch.float64)
            weights_V[size - num_padded :] = 0
            coins = torch.tensor([2.0**-53, 0.5, LARGEST], dtype=torch.float64)
            tokens = logit_rows.inverse_cdf(weights_V.expand(3, -1), coins)
            assert (tokens < size - num_padded).all()


def rounds_the_largest_words_to_one(monkeypatch):
    monkeypatch.setattr(
        uniforms, "u52", lambda high, low: (((high << 21) | (low >> 11)).double() + 0.5) * 2.0**-53
    )


@failure(43, rounds_the_largest_words_to_one)
def uniforms_lie_strictly_between_zero_and_one():
    words = torch.tensor([0, 0xFFFFFFFF])
    coins = uniforms.u52(words, words)
    assert (coins > 0).all()
    assert (coins < 1).all()


def keeps_all_that_equal_the_threshold(monkeypatch):
    def wrong(probs, cut):
        threshold = probs.topk(int(cut.top_k[0]), dim=-1).values[..., -1:]
        kept = torch.where(probs >= threshold, probs, 0.0)
        return kept / kept.sum(dim=-1, keepdim=True)

    monkeypatch.setattr(truncation, "truncate", wrong)


@failure(44, keeps_all_that_equal_the_threshold)
def of_equal_tokens_at_the_edge_the_lowest_ids_stay():
    probs = torch.tensor([[[0.4, 0.2, 0.2, 0.2]]], dtype=torch.float64)
    cut = Cut(torch.tensor([2]), torch.ones(1), torch.zeros(1))
    law = truncation.truncate(probs, cut)
    assert law.flatten().nonzero().flatten().tolist() == [0, 1]


def trusts_an_empty_residual(monkeypatch):
    def wrong(target, draft, vocab_size):
        residual = target.dense(vocab_size) - draft.dense(vocab_size)
        return Weights(weights_NM=residual.clamp(min=0))

    monkeypatch.setattr(reference, "_residual", wrong)


@failure(45, trusts_an_empty_residual)
def a_rejection_that_rounding_made_draws_from_the_target():
    count = 1000
    law = torch.tensor(P, dtype=torch.float64)
    draft = Draft(
        token_ids_BK=torch.zeros((count, 1), dtype=torch.int64),
        law=law.expand(count, 1, -1),
        num_drafts_B=torch.ones(count, dtype=torch.int64),
    )
    coins = torch.stack([torch.full((count,), 1.5, dtype=torch.float64), stratified(count)], dim=1)
    tokens = block_verify.verify_block(draft, law.expand(count, 2, -1), coins).token_ids_BL[:, 0]
    assert ((torch.bincount(tokens, minlength=4) - count * law).abs() <= 1).all()


def cuts_a_block_by_its_own_tokens(monkeypatch):
    draw = Laws.draw

    def wrong(laws, logits, coins, num_drafts):
        draft = draw(laws, logits, coins, num_drafts)
        is_liked_B = (draft.token_ids_BK == 1).any(dim=1)
        return dataclasses.replace(draft, num_drafts_B=torch.where(is_liked_B, 0, num_drafts))

    monkeypatch.setattr(Laws, "draw", wrong)


@failure(47, cuts_a_block_by_its_own_tokens)
def how_far_a_block_reaches_does_not_depend_on_what_was_drafted():
    law, _ = engine_law(TOYS["opposite"], Plan(2, (0, 2)), length=2)
    assert max_difference(law, target_law(TOYS["opposite"], 2)) < 1e-12
