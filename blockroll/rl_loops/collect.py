"""From prompts to rollouts: requests with derived seeds.

Seeds are a hash of what they are for, never the state of a generator: a run resumes from its step alone.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from blockroll.errors import InvalidInput
from blockroll.policies.prompts import PromptEncoder, Room
from blockroll.rl_loops.advantages import score_rollouts
from blockroll.rl_loops.tasks import RewardFunction, Row
from blockroll.rl_loops.watch.signals import acceptance_rate
from blockroll.rollout.engine.requests import derive_seed
from blockroll.rollout.pool.pool import RolloutPool
from blockroll.types import Request, Rollout, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rollouts in the order of their requests, with the row and the text of each."""

    rollouts: tuple[Rollout, ...]
    rows: tuple[Row, ...]
    completions: tuple[str, ...]
    group_ids: tuple[str, ...]
    duration_s: float  # from the first request to the last rollout


def collect(
    pool: RolloutPool,
    rows: Sequence[Row],
    *,
    name: str,
    seed_words: Sequence[object],
    group_size: int,
    sampling: Sampling,
    room: Room,
) -> Batch:
    """`group_size` rollouts of every row. Equal arguments and weights give equal batches under a fixed plan.

    Request ids are `name/row/sample`, as in `train step 3/0/1`; seeds are derived from `seed_words`, row and
    sample. Of a prompt that leaves no `room` the last tokens are what the policy goes on from.
    """
    encode = PromptEncoder(pool.tokenizer)
    prompts = [
        encode(row["prompt"], name=f"the prompt of row {index} of {name}") for index, row in enumerate(rows)
    ]
    requests = [
        Request(
            request_id=f"{name}/{index}/{sample}",
            group_id=f"{name}/{index}",
            prompt_ids=prompt_ids[-room.kept(len(prompt_ids)) :],
            seed=derive_seed(*seed_words, index, sample),
            sampling=sampling,
        )
        for index, prompt_ids in enumerate(prompts)
        for sample in range(group_size)
    ]
    start = time.perf_counter()
    finished = {rollout.request.request_id: rollout for rollout in pool.generate(requests)}
    duration_s = time.perf_counter() - start
    lost = [request.request_id for request in requests if request.request_id not in finished]
    assert not lost, f"the pool lost {len(lost)} rollouts: {lost[:3]}"
    # Rollouts arrive as they finish; sums over them must not depend on that.
    rollouts = tuple(finished[request.request_id] for request in requests)
    if any(rollout.law.weight is None for rollout in rollouts):
        raise InvalidInput(
            "rollouts of law 'none' have no importance ratio; train on the target or a mixed law"
        )
    return Batch(
        rollouts=rollouts,
        rows=tuple(row for row in rows for _ in range(group_size)),
        completions=tuple(pool.decode(rollout) for rollout in rollouts),
        group_ids=tuple(request.group_id or request.request_id for request in requests),
        duration_s=duration_s,
    )


def evaluate(
    pool: RolloutPool,
    rows: Sequence[Row],
    reward_fn: RewardFunction,
    *,
    name: str,
    seed_words: Sequence[object],
    sampling: Sampling,
    room: Room,
) -> dict[str, float]:
    """One rollout per held-out row; the mean is over valid rewards. Arguments as in `collect`."""
    batch = collect(
        pool,
        rows,
        name=name,
        seed_words=seed_words,
        group_size=1,
        sampling=sampling,
        room=room,
    )
    scores = score_rollouts(reward_fn, batch.rows, batch.rollouts, batch.completions)
    valid = scores.rewards_B[scores.is_valid_B]
    return {
        "eval/reward": float(valid.mean()) if len(valid) else math.nan,
        "eval/num_rollouts": float(len(valid)),
        "eval/acceptance_rate": acceptance_rate(batch.rollouts),
        "eval/mean_length": sum(len(rollout.token_ids) for rollout in batch.rollouts) / len(batch.rollouts),
    }
