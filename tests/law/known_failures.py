"""What the checks of other engines' bugs share: how one is registered, and what they sample from.

The numbers are those of docs/failures.md, which names the projects and says where each number is tested.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from blockroll.types import Plan, Sampling
from tests.engines import make_requests, run
from tests.models import prompts, random_policy

TWO_FORWARD, FUSED = Plan(4), Plan(4, (0, 2, 4))
P, Q = [0.5, 0.2, 0.2, 0.1], [0.2, 0.5, 0.1, 0.2]  # target and draft of the four-token fixture
LARGEST = 1 - 2.0**-53  # the largest uniform there is


class Failure(NamedTuple):
    """`check` raises AssertionError where the bug is; `plant` puts it there, through pytest's monkeypatch."""

    check: Callable[[], None]
    plant: Callable[[pytest.MonkeyPatch], None]


FAILURES: dict[int, Failure] = {}


def failure(number: int, plant: Callable[[pytest.MonkeyPatch], None]):
    def register(check: Callable[[], None]) -> Callable[[], None]:
        FAILURES[number] = Failure(check, plant)
        return check

    return register


def stratified(count: int) -> torch.Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def sample(plan: Plan = TWO_FORWARD, *, count: int = 24, **options):
    """A random policy, its rollouts, and the target rows each committed token was drawn from."""
    policy, rows = random_policy(), []

    def remember(record):
        committed = record.verdict.num_committed_B.tolist()
        rows.extend(
            (record.request_ids[b], record.target_probs_BLV[b, i].clone())
            for b in range(len(committed))
            for i in range(committed[b])
        )

    sampling = Sampling(max_tokens=24, ignore_eos=True, **options)
    rollouts = run(policy, make_requests(prompts(count), sampling), plan, observers=(remember,))
    return policy, list(rollouts.values()), rows


def causal_logits(policy, rollout):
    ids = torch.tensor([[*rollout.request.prompt_ids, *rollout.token_ids]])
    with torch.no_grad():
        logits = policy.model(ids, use_cache=False).logits[0].double()
    return logits[len(rollout.request.prompt_ids) - 1 : -1]
