"""From prompts to rollouts: requests with derived seeds, and what a batch of rollouts says about itself.

Seeds are a hash of what they are for, never the state of a generator: a run resumes from its step alone.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from blockroll.errors import InvalidInput
from blockroll.policies.prompts import PromptEncoder, Room
from blockroll.rl_loops.advantages import FAILED_REASONS, score_rollouts
from blockroll.rl_loops.tasks import RewardFunction, Row
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
        "eval/mean_length": _mean([len(rollout.token_ids) for rollout in batch.rollouts]),
    }


def acceptance_rate(rollouts: Sequence[Rollout]) -> float:
    """Accepted drafts per draft submitted to verify; NaN under the plain plan."""
    return _ratio(sum(r.stats.num_accepted for r in rollouts), sum(r.stats.num_drafted for r in rollouts))


def rollout_metrics(batch: Batch) -> dict[str, float]:
    """How a batch was generated; names as in verl and TRL where they have one."""
    rollouts = batch.rollouts
    rates = rollout_rates(rollouts, batch.duration_s)
    return {
        **{name: _ratio(*rate) for name, rate in rates.items()},
        "rollout/duration_s": batch.duration_s,
        "rollout/failed": float(sum(rollout.finish_reason in FAILED_REASONS for rollout in rollouts)),
        "completions/max_length": float(max((len(rollout.token_ids) for rollout in rollouts), default=0)),
        **plan_shares(plan_counts(rollouts)),
    }


def rollout_rates(rollouts: Sequence[Rollout], duration_s: float) -> dict[str, tuple[float, float]]:
    """Metrics as numerator and denominator, which may be summed over processes before they are divided."""
    num_tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    accept_lengths = [
        1 + rollout.stats.num_accepted / rollout.stats.num_verify_steps
        for rollout in rollouts
        if rollout.stats.num_verify_steps
    ]
    num_shortages = sum(rollout.stats.num_shortages for rollout in rollouts)
    speedups = [rollout.stats.speedups for rollout in rollouts if rollout.stats.speedups is not None]
    effective = [rollout.effective_sample_size for rollout in rollouts if rollout.token_ids]
    return {
        "rollout/acceptance_rate": (
            sum(rollout.stats.num_accepted for rollout in rollouts),
            sum(rollout.stats.num_drafted for rollout in rollouts),
        ),
        "rollout/tokens_per_forward": (num_tokens, sum(rollout.stats.num_forwards for rollout in rollouts)),
        "rollout/spec_accept_length": (sum(accept_lengths), len(accept_lengths)),
        "rollout/generated_tok_s": (num_tokens, duration_s),
        "rollout/speedup_predicted": (sum(predicted for predicted, _ in speedups), len(speedups)),
        "rollout/speedup_achieved": (sum(achieved for _, achieved in speedups), len(speedups)),
        "rollout/prefix_hit_rate": (
            sum(rollout.stats.num_reused for rollout in rollouts),
            sum(rollout.stats.num_prefilled + rollout.stats.num_reused for rollout in rollouts),
        ),
        "rollout/preempted": (sum(rollout.stats.num_preempted for rollout in rollouts), len(rollouts)),
        "rollout/shortage_rate": (num_shortages, num_shortages + plan_counts(rollouts).total()),
        "rollout/log_ratio_mean": (sum(rollout.log_ratio for rollout in rollouts), len(rollouts)),
        "rollout/effective_sample_size": (sum(effective), len(effective)),
        "completions/mean_length": (num_tokens, len(rollouts)),
        "completions/clipped_ratio": (
            sum(rollout.finish_reason == "length" for rollout in rollouts),
            len(rollouts),
        ),
    }


def plan_counts(rollouts: Sequence[Rollout]) -> Counter[str]:
    """Request-steps by the name of the plan that ran."""
    counts: Counter[str] = Counter()
    for rollout in rollouts:
        counts.update({plan.name: count for plan, count in rollout.stats.steps_by_plan})
    return counts


def plan_shares(counts: Counter[str]) -> dict[str, float]:
    """`rollout/plan/<name>`: the share of request-steps that each plan ran; they sum to 1."""
    return {f"rollout/plan/{name}": count / counts.total() for name, count in counts.items()}


def _mean(values: Sequence[float]) -> float:
    return _ratio(sum(values), len(values))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
