"""The rule of equality allows near-ties, counts them, and nothing else."""

from dataclasses import replace

import pytest
import torch

from blockroll.policies.hf import HFPolicy
from blockroll.samplers import token_uniforms
from blockroll.types import Law, Plan, Sampling
from tests.engines import make_requests, run
from tests.equality import COIN_TOLERANCE, assert_same_rollouts, coin_margin
from tests.models import prompts, random_model, random_policy

PLANS = pytest.mark.parametrize(
    "plan", [Plan(0), Plan(4), Plan(4, (0, 2, 4))], ids=["plain", "two_forward", "fused"]
)


@pytest.fixture(scope="module")
def policy():
    return random_policy()


def with_another_token(rollout, index):
    """The rollout as if the token had been drawn otherwise, and what follows had followed nonetheless."""
    tokens = list(rollout.token_ids)
    tokens[index] = 4 + (tokens[index] - 3) % 20
    return replace(rollout, token_ids=tuple(tokens))


@PLANS
def test_another_token_is_a_difference_unless_its_coin_lay_on_a_boundary(policy, plan):
    rollouts = run(policy, make_requests(prompts(4), Sampling(max_tokens=16, ignore_eos=True)), plan)
    assert assert_same_rollouts(rollouts, rollouts, policy) == []
    for index in (0, 1, 9):
        other = {**rollouts, "r2": with_another_token(rollouts["r2"], index)}
        with pytest.raises(AssertionError, match=f"r2 differs at token {index}, its coins keep"):
            assert_same_rollouts(rollouts, other, policy)


def test_a_coin_on_a_boundary_is_a_near_tie_and_is_counted(policy):
    """Of a hundred thousand seeds some draw the first token by a coin that lies so close."""
    (request,) = make_requests([(5, 6, 7)], Sampling(max_tokens=3, ignore_eos=True))
    seeds = torch.arange(100_000)
    coins = token_uniforms(seeds, torch.full_like(seeds, 3))[:, None]
    ids = torch.tensor([request.prompt_ids])
    edges = policy.model(ids, use_cache=False).logits[0, -1].double().softmax(-1).cumsum(-1)[:-1]
    distance = (coins - edges).abs().min(dim=-1).values
    (near,) = run(policy, [replace(request, seed=int(distance.argmin()))], Plan(0)).values()
    assert coin_margin(policy, near, 0) < COIN_TOLERANCE
    other = with_another_token(near, 0)
    assert assert_same_rollouts([near], [other], policy) == ["r0"]
    with pytest.raises(AssertionError, match="1 near-ties"):
        assert_same_rollouts([near], [other], policy, at_most=0)


def test_greedily_a_near_tie_is_one_of_the_two_best_logits():
    model = random_model()
    rollouts = run(HFPolicy(model), make_requests(prompts(3), Sampling(temperature=0, max_tokens=6)), Plan(4))
    other = {**rollouts, "r1": with_another_token(rollouts["r1"], 0)}
    with pytest.raises(AssertionError, match="r1 differs at token 0, where the best logits are"):
        assert_same_rollouts(rollouts, other, HFPolicy(model))
    with torch.no_grad():
        model.lm_head.weight[other["r1"].token_ids[0]] = model.lm_head.weight[rollouts["r1"].token_ids[0]]
    assert assert_same_rollouts(rollouts, other, HFPolicy(model)) == ["r1"]


@pytest.mark.parametrize("column", ["policy_logprobs", "behavior_logprobs"])
def test_logprobs_may_differ_by_rounding_and_no_more(policy, column):
    (rollout,) = run(policy, make_requests(prompts(1), Sampling(max_tokens=6)), Plan(4)).values()
    for shift, is_same in ((5e-5, True), (2e-4, False)):
        first, *others = getattr(rollout, column)
        other = replace(rollout, **{column: (first + shift, *others)})
        if is_same:
            assert_same_rollouts([rollout], [other], policy)
        else:
            with pytest.raises(AssertionError, match=f"r0: {column} differ"):
                assert_same_rollouts([rollout], [other], policy)


def test_other_ends_other_laws_and_missing_rollouts_are_differences(policy):
    rollouts = run(policy, make_requests(prompts(2), Sampling(max_tokens=6, ignore_eos=True)), Plan(0))
    for other in (
        {"r0": rollouts["r0"]},
        {**rollouts, "r1": replace(rollouts["r1"], finish_reason="stop")},
        {**rollouts, "r1": replace(rollouts["r1"], law=Law(0.5))},
        {**rollouts, "r1": replace(rollouts["r1"], policy_versions=(1,) * 6)},
        [*rollouts.values(), rollouts["r1"]],
    ):
        with pytest.raises(AssertionError):
            assert_same_rollouts(rollouts, other, policy)


def test_a_rollout_that_was_cut_equals_the_beginning_of_the_whole(policy):
    requests = make_requests(prompts(1), Sampling(max_tokens=12, ignore_eos=True))
    (whole,) = run(policy, requests, Plan(4)).values()
    columns = ("token_ids", "policy_logprobs", "behavior_logprobs", "policy_versions")
    cut = replace(whole, finish_reason="abort", **{name: getattr(whole, name)[:5] for name in columns})
    assert assert_same_rollouts([whole], [cut], policy, cut=True) == []
    with pytest.raises(AssertionError):
        assert_same_rollouts([whole], [cut], policy)
    with pytest.raises(AssertionError, match="differs at token 3"):
        assert_same_rollouts([whole], [with_another_token(cut, 3)], policy, cut=True)
