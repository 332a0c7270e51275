"""What tells one RL algorithm from another: its phases.

A step of the loop draws a batch of rollouts and then asks its algorithm, in this order: `score` them, say by
`advantages` what each is worth, and for every optimizer step give the `loss` of a chunk of their tokens.
Collecting, the correction for the behaviour law, the optimizer, publishing and checkpoints are the loop's own
and the same for all.

Shapes: B rollouts of a batch, N completion tokens of a chunk, one rollout after another.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from blockroll.rl_loops.advantages import Advantages, Scores
from blockroll.rl_loops.collect import Batch
from blockroll.rl_loops.losses import TokenLoss
from blockroll.rl_loops.tasks import RewardFunction


class Algorithm(Protocol):
    """One RL algorithm, which keeps no state between steps: a run resumes from its checkpoint alone."""

    @property
    def name(self) -> str:
        """What `train.algorithm` says."""
        ...

    def score(self, reward_fn: RewardFunction, batch: Batch) -> Scores:
        """Rewards (B) of a batch. What failed is NaN and counted, never a made-up reward."""
        ...

    def advantages(self, scores: Scores, group_ids: Sequence[str]) -> Advantages:
        """What each rollout is worth to the loss, `group_ids` saying which share a prompt. Deterministic."""
        ...

    def loss(
        self,
        learner_logprobs_N: Tensor,
        old_logprobs_N: Tensor,
        weights_N: Tensor,
        advantages_N: Tensor,
        *,
        is_valid_N: Tensor,
        clip_epsilon: float,
    ) -> TokenLoss:
        """The loss of a chunk's tokens; only `learner_logprobs_N` carries a gradient.

        `weights_N` correct for the behaviour law. Tokens that are not valid leave sum and denominator alike.
        Sums of chunks add up to that of the batch.
        """
        ...
