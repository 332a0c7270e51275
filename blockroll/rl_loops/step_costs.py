"""What a decoding step costs: measured on real steps of a scratch engine."""

import statistics
from collections.abc import Sequence

import torch

from blockroll.policies.base import Policy
from blockroll.rollout.drafters.engine import Engine
from blockroll.types import Plan, Request, Sampling


def step_costs(
    policy: Policy, plans: Sequence[Plan], batches: Sequence[int], *, context: int, repeats: int = 3
) -> dict[tuple[Plan, int], float]:
    """Seconds of one step by plan and batch: the median of `repeats` behind about `context` tokens.

    Random prompts; what is drafted and accepted does not change what a step costs.
    """
    costs = {}
    num_steps = repeats + 1  # the first warms up
    widest = max(plan.num_drafts for plan in plans) + 1
    context = max(1, min(context, policy.max_length - num_steps * widest - 1))
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        ids = torch.randint(policy.vocab_size, (batch, context), generator=generator)
        for plan in plans:
            engine = Engine(
                policy,
                plan=plan,
                max_batch_size=batch,
                max_length=min(policy.max_length, context + num_steps * widest),
            )
            sampling = Sampling(max_tokens=num_steps * widest, ignore_eos=True)
            engine.submit(
                Request(request_id=str(row), prompt_ids=tuple(ids[row].tolist()), seed=row, sampling=sampling)
                for row in range(batch)
            )
            seconds = []
            for _ in range(num_steps):
                before = engine.times.step_s
                engine.step()
                seconds.append(engine.times.step_s - before)
            costs[plan, batch] = statistics.median(seconds[1:])
    return costs
