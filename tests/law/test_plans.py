"""Every plan's own history of drafts, and the mixed law: exact through the whole engine, on tables."""

import dataclasses

import numpy as np
import pytest
import torch

from blockroll.errors import InvalidInput
from blockroll.kernels.rows import edits as edits_module
from blockroll.kernels.rows import mixed_logits
from blockroll.rollout.drafters.mask_rows import MaskRows
from blockroll.rollout.engine import step as decoding
from blockroll.samplers import draw_draft
from blockroll.samplers import laws as laws_module
from blockroll.types import Law, Plan, Sampling
from tests.law.engine_law import engine_law
from tests.law.integrate import max_difference, target_law
from tests.law.toys import TOYS
from tests.params import slow_beyond

PLANS = [
    Plan(0),
    Plan(1),
    Plan(2),
    Plan(1, (0,)),
    Plan(1, (0, 1)),
    Plan(2, (0,)),
    Plan(2, (0, 2)),
    Plan(2, (0, 1, 2)),
]
DRAFTING = [plan for plan in PLANS if plan.num_drafts]
SWITCHES = [
    (Plan(0), Plan(2, (0, 2)), Plan(1)),
    (Plan(1, (0,)), Plan(2, (0, 1, 2)), Plan(2, (0,))),
    (Plan(2, (0, 2)), Plan(1, (0, 1)), Plan(0)),
    (Plan(2), Plan(2, (0,)), Plan(2, (0, 2))),
]
WEIGHTS = [0.5, 0.0, 0.25]
LENGTH = 3
POSITIVE = ["stochastic", "argmax_draft", "hot", "cold"]  # an engine takes -inf logits for a failed forward


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize("name", [*POSITIVE, "greedy", "greedy_argmax_draft"])
def test_committed_tokens_follow_the_target_law_under_every_plan(plan, name):
    law, corrected = engine_law(TOYS[name], plan, length=LENGTH)
    assert max_difference(law, target_law(TOYS[name], LENGTH)) < 1e-12
    if TOYS[name].temperature:
        assert max_difference(law, corrected) < 1e-12


@pytest.mark.parametrize("plan", DRAFTING, ids=lambda plan: plan.name)
@pytest.mark.parametrize("weight", slow_beyond(1, WEIGHTS))
@pytest.mark.parametrize("name", POSITIVE)
def test_the_product_of_pi_over_mu_corrects_the_mixed_law(plan, weight, name):
    """Over the joint law of text and block path; without the correction the law is visibly another."""
    toy = TOYS[name]
    law, corrected = engine_law(toy, plan, length=LENGTH, weight=weight)
    expected = target_law(toy, LENGTH)
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    assert max_difference(corrected, expected) < 1e-12
    assert max_difference(law, expected) > 1e-2


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", POSITIVE)
def test_one_block_follows_the_mixed_rows_and_then_the_causal_one(weight, name):
    toy, num_drafts = TOYS[name], 2
    law, _ = engine_law(toy, Plan(num_drafts), length=1, weight=weight)
    row = np.array(toy.target_weights(())) ** weight * np.array(toy.draft_weights((), 0)) ** (1 - weight)
    powered = row ** (1 / toy.temperature)
    expected = {(token,): p for token, p in enumerate((powered / powered.sum()).tolist())}
    assert max_difference(law, expected) < 1e-12


@pytest.mark.parametrize("plans", SWITCHES, ids=lambda plans: "-".join(plan.name for plan in plans))
@pytest.mark.parametrize(
    ("name", "weight"), [("stochastic", 1.0), ("hot", 1.0), ("greedy", 1.0), ("hot", 0.5)]
)
def test_switching_plans_at_every_step_leaves_the_law_exact(plans, name, weight):
    law, corrected = engine_law(TOYS[name], *plans, length=LENGTH, weight=weight)
    expected = target_law(TOYS[name], LENGTH)
    assert max_difference(corrected if TOYS[name].temperature else law, expected) < 1e-12
    assert weight < 1 or max_difference(law, expected) < 1e-12


def mixes_the_extra_row(policy_logits, draft_logits, weight, num_drafts):
    mixed = mixed_logits(policy_logits, draft_logits, weight, num_drafts)
    wrong = weight[:, None] * mixed[:, -1] + (1 - weight[:, None]) * draft_logits[:, -1]
    return torch.cat([mixed[:, :-1], wrong[:, None]], dim=1)


def forgets_the_draft_temperature(logits, temperature, uniforms, num_drafts, **kwargs):
    draft = draw_draft(logits, temperature, uniforms, num_drafts, **kwargs)
    return dataclasses.replace(draft, law=logits.double().softmax(-1))


def keeps_a_slot_too_early(drafter, step, states, *decided):
    return proposals_of(drafter, step, states.roll(1, dims=2), *decided)


proposals_of = MaskRows.leave


@pytest.mark.parametrize(
    ("where", "name", "bug", "weight"),
    [
        (edits_module, "mixed_logits", mixes_the_extra_row, 0.5),
        (laws_module, "draw_draft", forgets_the_draft_temperature, 1.0),
        (MaskRows, "leave", keeps_a_slot_too_early, 1.0),
    ],
)
def test_a_planted_bug_of_the_engine_breaks_the_law(monkeypatch, where, name, bug, weight):
    monkeypatch.setattr(where, name, bug)
    _, corrected = engine_law(TOYS["hot"], Plan(2, (0, 2)), length=LENGTH, weight=weight)
    assert max_difference(corrected, target_law(TOYS["hot"], LENGTH)) > 1e-4


def test_a_wrong_behavior_logprob_leaves_the_mixed_law_uncorrected(monkeypatch):
    verify_block = decoding.verify_block

    def reports_the_policy(draft, target_probs, uniforms):
        verdict = verify_block(draft, target_probs, uniforms)
        return dataclasses.replace(verdict, behavior_logprobs_BL=verdict.behavior_logprobs_BL * 0)

    monkeypatch.setattr(decoding, "verify_block", reports_the_policy)
    _, corrected = engine_law(TOYS["stochastic"], Plan(2), length=LENGTH, weight=0.5)
    assert max_difference(corrected, target_law(TOYS["stochastic"], LENGTH)) > 1e-2


def test_weight_zero_accepts_every_stochastic_draft():
    toy = TOYS["stochastic"]
    law, _ = engine_law(toy, Plan(2), length=2, weight=0.0)
    expected = {
        (first, second): p * q
        for first, p in enumerate(toy.draft_V((), 0).tolist())
        for second, q in enumerate(toy.draft_V((), 1).tolist())
    }
    assert max_difference(law, expected) < 1e-12


def test_weight_one_leaves_every_row_bit_identical_whatever_the_drafts_hold():
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(3, 5, 7, generator=generator)
    draft = torch.randn(3, 4, 7, generator=generator) * 1e6
    mixed = mixed_logits(policy, draft, torch.tensor([1.0, 0.5, 1.0]), torch.tensor([4, 4, 2]))
    assert torch.equal(mixed[[0, 2]], policy[[0, 2]].double())
    assert not torch.equal(mixed[1, :4], policy[1, :4].double())
    assert torch.equal(mixed[1, 4], policy[1, 4].double())


def test_a_draft_row_enters_only_where_its_request_has_a_draft():
    policy, draft = torch.zeros(2, 4, 3), torch.ones(2, 3, 3)
    mixed = mixed_logits(policy, draft, torch.tensor([0.25, 0.25]), torch.tensor([1, 3]))
    assert mixed[:, :, 0].tolist() == [[0.75, 0, 0, 0], [0.75, 0.75, 0.75, 0]]


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_a_weight_outside_its_range_is_refused(weight):
    with pytest.raises(InvalidInput, match="between 0 and 1, got"):
        Law(weight)


def test_mixing_has_no_greedy_form():
    with pytest.raises(InvalidInput, match=r"law mixed\(0\.5\) has no greedy form"):
        Sampling(temperature=0, law=Law(0.5))


@pytest.mark.parametrize("levels", [(1,), (0, 3), (0, 2, 1), (0, 0), (2, 4)])
def test_a_level_set_without_0_out_of_order_or_past_k_is_refused(levels):
    with pytest.raises(InvalidInput, match="must rise from 0 to at most K = 2"):
        Plan(2, levels)
