"""Bugs that other engines shipped: each is a check that production passes and that the planted bug fails.

The numbers are those of docs/failures.md, which names the projects and says where each number is tested.
"""

import dataclasses
import math

import pytest
import torch

from blockroll.kernels.rows import weights
from blockroll.types import Law, Plan
from tests.law import failures_of_coins, failures_of_logprobs, failures_of_samplers
from tests.law.failures_of_samplers import fixture_law
from tests.law.known_failures import FAILURES, FUSED, TWO_FORWARD, causal_logits, sample
from tests.law.mutants import final_from_target

assert all(
    (failures_of_coins, failures_of_logprobs, failures_of_samplers)
)  # importing them registers the checks

PLANTED = pytest.mark.parametrize(
    "number", [pytest.param(number, marks=pytest.mark.failure(number)) for number in sorted(FAILURES)]
)


@PLANTED
def test_production_does_not_have_the_bug(number):
    FAILURES[number].check()


@PLANTED
def test_the_planted_bug_is_found(number, monkeypatch):
    FAILURES[number].plant(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        FAILURES[number].check()


@pytest.mark.failure(35)
def test_a_redraw_from_the_target_has_its_known_law():
    law = fixture_law(final_from_target)
    assert torch.allclose(law, torch.tensor([0.40, 0.28, 0.18, 0.14], dtype=torch.float64), atol=2e-3)


@pytest.mark.failure(22)
def test_the_weight_of_a_rollout_is_a_product_not_a_sum():
    (rollout,) = sample(count=1, law=Law(0.5))[1]
    two = dataclasses.replace(
        rollout,
        token_ids=(1, 2),
        policy_logprobs=(math.log(0.5), math.log(0.25)),
        behavior_logprobs=(math.log(0.25), math.log(0.5)),
        policy_versions=(0, 0),
    )
    assert math.exp(two.log_ratio) == pytest.approx(2 * 0.5)


def always_takes_the_best(monkeypatch):
    def best(cumulative_V, coins):
        return torch.cat([cumulative_V[..., :1], cumulative_V.diff(dim=-1)], dim=-1).argmax(dim=-1)

    monkeypatch.setattr(weights, "_search", best)


@pytest.mark.failure(39)
@pytest.mark.parametrize("plan", [Plan(0), TWO_FORWARD, FUSED], ids=lambda plan: plan.name)
def test_at_temperature_one_tokens_are_not_the_best_ones(plan, monkeypatch):
    """A sampler that is silently greedy takes the likeliest token every time."""

    def share_of_best() -> float:
        policy, rollouts, _ = sample(plan)
        best = []
        for rollout in rollouts:
            best.append(causal_logits(policy, rollout).argmax(-1) == torch.tensor(rollout.token_ids))
        return torch.cat(best).double().mean().item()

    production = share_of_best()
    always_takes_the_best(monkeypatch)
    assert production < 0.5
    assert share_of_best() > production + 0.1
