"""Rewards of rollouts and what they are worth within their group.

Rule for what failed: a rollout that ended in an error or was aborted, and one whose reward raised, is
None or is not finite, leaves its group's mean and standard deviation and the loss. It is counted.

Shapes: B rollouts.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockroll.errors import InvalidInput
from blockroll.rl_loops.tasks import RewardFunction, Row
from blockroll.types import Rollout

log = logging.getLogger(__name__)

FAILED_REASONS = ("error", "abort")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Rewards of a batch of rollouts and why some are missing."""

    rewards_B: Tensor  # float64; NaN where the rollout or its reward failed
    num_rollouts_failed: int  # finish_reason "error" or "abort"; never shown to the reward function
    num_rewards_failed: int  # raised, None or not finite
    errors: tuple[str, ...]  # class and message of every reward that raised

    @property
    def is_valid_B(self) -> Tensor:
        """Which rollouts take part in statistics and loss."""
        return self.rewards_B.isfinite()


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """What each rollout is worth to the loss."""

    advantages_B: Tensor  # float32; 0 where not valid
    is_valid_B: Tensor  # bool; False leaves the loss
    reward_mean: float  # over valid rollouts; NaN without any
    reward_std: float  # mean over groups of the standard deviation within; NaN without any group of two
    frac_zero_std: float  # share of groups that teach nothing: all rewards equal, or fewer than two valid


def score_rollouts(
    reward_fn: RewardFunction, rows: Sequence[Row], rollouts: Sequence[Rollout], completions: Sequence[str]
) -> Scores:
    """Reward of every rollout; `rows` and `completions` are parallel to `rollouts`.

    The function gets every column that any row of the batch has, None where a row lacks it, and sees the
    whole batch in one call. If it raises, it is called for each rollout alone, so
    that only those that raise are lost. A result of the wrong length is a bug in the function and raises.
    """
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "prompt"]
    sound = [i for i, rollout in enumerate(rollouts) if rollout.finish_reason not in FAILED_REASONS]
    rewards_B = torch.full((len(rollouts),), math.nan, dtype=torch.float64)
    errors: list[str] = []

    def score(indices: list[int]) -> str | None:
        """Fill in the rewards of these rollouts, or say what the function raised."""
        arguments = {
            "prompts": [rows[i]["prompt"] for i in indices],
            "completions": [completions[i] for i in indices],
            "completion_ids": [list(rollouts[i].token_ids) for i in indices],
            **{key: [rows[i].get(key) for i in indices] for key in columns},
        }
        try:
            values = reward_fn(**arguments)
        except Exception as error:  # noqa: BLE001 - the user's code may raise anything; it is counted and named
            return f"{type(error).__name__}: {error}"
        if len(values) != len(indices):
            raise InvalidInput(
                f"a reward function must return {len(indices)} rewards here, got {len(values)}"
            )
        numbers = [math.nan if value is None else float(value) for value in values]
        rewards_B[indices] = torch.tensor(numbers, dtype=torch.float64)
        return None

    if sound and (error := score(sound)) is not None:
        log.warning("RewardRaised: %s; the reward function is now called for each rollout alone", error)
        errors = [error for i in sound if (error := score([i])) is not None]
    rewards_B[~rewards_B.isfinite()] = math.nan
    num_rewards_failed = len(sound) - int(rewards_B.isfinite().sum())
    if num_rewards_failed:
        log.warning(
            "RewardFailed: %d of %d rollouts have no reward (%s); they leave group statistics and loss",
            num_rewards_failed,
            len(sound),
            f"the first raised {errors[0]}" if errors else "None or not finite",
        )
    return Scores(
        rewards_B=rewards_B,
        num_rollouts_failed=len(rollouts) - len(sound),
        num_rewards_failed=num_rewards_failed,
        errors=tuple(errors),
    )


def group_advantages(rewards_B: Tensor, group_ids: Sequence[str], *, epsilon: float = 1e-4) -> Advantages:
    """GRPO's advantage: the reward against the other rollouts of its prompt.

        A_i = (r_i - mean(r)) / (std(r) + epsilon)      over the valid rollouts of the group

    with the sample standard deviation (divisor n - 1), as in TRL.
    Source: DeepSeekMath (arXiv 2402.03300), section 4.1.2, outcome supervision.
    """
    return by_group(
        rewards_B, group_ids, lambda rewards: (rewards - rewards.mean()) / (rewards.std() + epsilon)
    )


def by_group(rewards_B: Tensor, group_ids: Sequence[str], worth: Callable[[Tensor], Tensor]) -> Advantages:
    """Advantages that `worth` gives a group's valid rewards (n of them, n >= 2, float64), in their order.

    A group with fewer than two valid rollouts has nothing to be compared with: its advantages are 0.
    """
    is_valid_B = rewards_B.isfinite()
    advantages_B = torch.zeros(len(rewards_B), dtype=torch.float64)
    members: dict[str, list[int]] = {}
    for i, group_id in enumerate(group_ids):
        members.setdefault(group_id, []).append(i)
    stds: list[float] = []
    num_flat = 0
    for group in members.values():
        valid = [i for i in group if is_valid_B[i]]
        if len(valid) < 2:
            num_flat += 1
            continue
        rewards = rewards_B[valid]
        std = float(rewards.std())
        stds.append(std)
        num_flat += std == 0
        advantages_B[valid] = worth(rewards)
    return Advantages(
        advantages_B=advantages_B.float(),
        is_valid_B=is_valid_B,
        reward_mean=float(rewards_B[is_valid_B].mean()) if is_valid_B.any() else math.nan,
        reward_std=sum(stds) / len(stds) if stds else math.nan,
        frac_zero_std=num_flat / len(members) if members else math.nan,
    )
