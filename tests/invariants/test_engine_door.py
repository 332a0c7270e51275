"""What an engine refuses before anything runs, and what it must not mistake for something to refuse."""

import pytest
import torch

from blockroll.errors import InvalidInput
from blockroll.rollout.drafters.engine import Engine
from blockroll.types import Plan, PlanKind, Sampling
from tests.engines import causal_logprobs, make_requests, run
from tests.models import MASK_ID, random_policy

PLAIN, TWO_FORWARD, FUSED = Plan(0), Plan(4), Plan(4, (0, 2, 4))


@pytest.fixture(scope="module")
def policy():
    return random_policy()


def test_a_plan_says_of_which_kind_it_is():
    kinds = [plan.kind for plan in (PLAIN, TWO_FORWARD, FUSED)]
    assert kinds == [PlanKind.PLAIN, PlanKind.TWO_FORWARD, PlanKind.FUSED]
    with pytest.raises(InvalidInput, match="a plan of 0 drafts has none"):
        Plan(0, (0,))


@pytest.mark.parametrize(
    ("prompt", "advice"),
    [
        ((), "empty prompt"),
        (tuple([5] * 96), "96 tokens, but the context holds 96"),
        ((5, 24), "token 24 at position 1, outside the vocabulary of 24"),
        ((-1,), "token -1 at position 0"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_at_the_door(policy, prompt, advice):
    engine = Engine(policy, plan=TWO_FORWARD)
    with pytest.raises(InvalidInput, match=advice):
        engine.submit(make_requests([(5, 6), prompt], Sampling()))
    assert engine.num_requests == 0


@pytest.mark.parametrize("plan", [TWO_FORWARD, FUSED], ids=lambda plan: plan.name)
def test_a_mask_token_in_a_text_is_a_token_like_any_other(policy, plan):
    """A policy may have drawn its own, and a later turn of the text must go on: rows are masks by kind."""
    assert policy.mask_token_id == MASK_ID
    texts = [(5, MASK_ID, 6), (MASK_ID, MASK_ID), (7, 8, MASK_ID)]
    sampling = Sampling(max_tokens=12, ignore_eos=True, logit_bias={MASK_ID: 4.0})
    finished = run(policy, make_requests(texts, sampling), plan)
    assert any(MASK_ID in rollout.token_ids for rollout in finished.values())
    for rollout in finished.values():
        got = torch.tensor(rollout.policy_logprobs).double()
        torch.testing.assert_close(got, causal_logprobs(policy, rollout), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ({"temperature": -0.5}, "temperature must be at least 0, got -0.5; 0 means greedy"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"draft_temperature": -1.0}, "draft_temperature must be at least 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"stop": ("",)}, "stop strings must not be empty"),
    ],
)
def test_sampling_outside_its_range_is_refused(arguments, advice):
    with pytest.raises(InvalidInput, match=advice):
        Sampling(**arguments)


def test_plans_outside_the_policys_reach_are_refused_or_named():
    with pytest.raises(InvalidInput, match="drafts nothing"):
        Plan.parse("two_forward(0)", default_drafts=4)
    with pytest.raises(InvalidInput, match="has levels, which only fused plans have"):
        Plan.parse("two_forward(4,[0,2])", default_drafts=4)
    with pytest.raises(InvalidInput, match="plan must be"):
        Plan.parse("three_forward", default_drafts=4)
    with pytest.raises(InvalidInput, match="at most 256 tokens a step, got K = 9999"):
        Plan.parse("two_forward(9999)", default_drafts=4)
    with pytest.raises(InvalidInput, match="at most 4096 rows in a forward, got 16770: 129 proposals of 128"):
        Plan(128, tuple(range(129)))
    policy = random_policy(trained_drafts=4, layouts=("two_forward",))
    with pytest.raises(InvalidInput, match="drafts 96 tokens, but the policy's context holds 96"):
        Engine(policy, plan=Plan(96))
    with pytest.warns(UserWarning, match=r"two_forward\(6\) drafts more than the 4 tokens"):
        Engine(policy, plan=Plan(6))
    with pytest.warns(UserWarning, match="in a layout this policy was not trained for, only for two_forward"):
        Engine(policy, plan=FUSED)
    policy.mask_token_id = None
    with pytest.raises(InvalidInput, match="needs a policy that drafts"):
        Engine(policy, plan=Plan(4))
    with pytest.raises(InvalidInput, match="serves 96 positions"):
        Engine(policy, plan=PLAIN, max_length=97)


def test_the_same_request_id_twice_is_refused(policy):
    engine = Engine(policy, plan=PLAIN)
    (request,) = make_requests([(5, 6)], Sampling())
    with pytest.raises(InvalidInput, match="'r0' is already being served"):
        engine.submit([request, request])
