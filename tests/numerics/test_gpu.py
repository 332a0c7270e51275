"""A GPU draws what the CPU draws, by the rule of equality."""

import pytest

from blockroll.policies.hf import HFPolicy
from blockroll.types import Plan, Sampling
from tests.engines import make_requests, run
from tests.equality import assert_same_rollouts
from tests.models import prompts, random_model, random_policy


@pytest.mark.gpu
@pytest.mark.parametrize(
    "plan", [Plan(0), Plan(4), Plan(4, (0, 2, 4))], ids=["plain", "two_forward", "fused"]
)
def test_a_gpu_draws_what_the_cpu_draws(plan):
    policy = random_policy()
    requests = make_requests(prompts(16), Sampling(max_tokens=16))
    drawn = run(HFPolicy(random_model().to("cuda")), requests, plan)
    assert_same_rollouts(run(policy, requests, plan), drawn, policy)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "plan", [Plan(0), Plan(4), Plan(4, (0, 2, 4))], ids=["plain", "two_forward", "fused"]
)
def test_captured_graphs_draw_what_forwards_do(plan):
    policy = HFPolicy(random_model().to("cuda"))
    requests = make_requests(prompts(16), Sampling(max_tokens=16))
    captured = run(policy, requests, plan, max_batch_size=6, graphs="on")
    assert_same_rollouts(run(policy, requests, plan, max_batch_size=6, graphs="off"), captured, policy)
