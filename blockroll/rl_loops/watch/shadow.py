"""Shadow rollouts: a stated share of a step's prompts, answered under the other law too.

While rollouts are drawn as asked, the other law is the lossless one; in a fallback it is the one that was
asked for, so that pairs go on and can show that it does no harm. Which prompts have a shadow is a hash of the
run's seed, the step and the prompt's place, never of anything that was drawn; the coins are others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from blockroll.rl_loops.advantages import Scores
from blockroll.rl_loops.collect import Batch
from blockroll.rollout.engine.requests import derive_seed
from blockroll.types import Law, Sampling

_SEEDS = float(1 << 63)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadow:
    """The answers of some prompts under the other law."""

    places: tuple[int, ...]  # of these prompts in the step
    batch: Batch
    scores: Scores


def shadowed(share: float, count: int, *, seed: int, step: int) -> list[int]:
    """Places of the prompts, of so many, that have a shadow in this step."""
    return [place for place in range(count) if derive_seed(seed, "shadow", step, place) < share * _SEEDS]


def lossless(sampling: Sampling) -> Sampling:
    """The same without mixing."""
    return replace(sampling, law=Law())


def rewards_by_group(scores: Scores, group_size: int) -> list[list[float]]:
    """Of each prompt of a batch in which every one has a group of this size."""
    groups: list[list[float]] = scores.rewards_B.view(-1, group_size).tolist()
    return groups


def joined(batch: Batch, scores: Scores, shadow: Shadow) -> tuple[Batch, Scores]:
    """The rollouts of both as one batch to learn from; groups of a shadow stay groups of their own."""
    other = shadow.batch
    return (
        Batch(
            rollouts=batch.rollouts + other.rollouts,
            rows=batch.rows + other.rows,
            completions=batch.completions + other.completions,
            group_ids=batch.group_ids + other.group_ids,
            duration_s=batch.duration_s + other.duration_s,
        ),
        Scores(
            rewards_B=torch.cat([scores.rewards_B, shadow.scores.rewards_B]),
            num_rollouts_failed=scores.num_rollouts_failed + shadow.scores.num_rollouts_failed,
            num_rewards_failed=scores.num_rewards_failed + shadow.scores.num_rewards_failed,
            errors=scores.errors + shadow.scores.errors,
        ),
    )


def shadow_metrics(
    shadow: Shadow, groups: Sequence[Sequence[float]], others: Sequence[Sequence[float]]
) -> dict[str, float]:
    """What a step's shadow was, and cost; `groups` are the rewards of its prompts under the law in use."""
    return {
        "shadow/num_rollouts": float(len(shadow.batch.rollouts)),
        "shadow/duration_s": shadow.batch.duration_s,
        "shadow/reward": _mean(others),
        "shadow/reward_in_use": _mean(groups),
    }


def _mean(groups: Sequence[Sequence[float]]) -> float:
    return float(torch.tensor([each for group in groups for each in group], dtype=torch.float64).nanmean())
