"""What tells one RL algorithm from another: its phases.

A step of the loop draws a batch of rollouts and then asks its algorithm, in this order: `score` them, say by
`advantages` what each is worth, and for every optimizer step give the `loss` of a chunk of their tokens.
Collecting, the correction for the behaviour law, the optimizer, publishing and checkpoints are the loop's own
and the same for all.

Shapes: B rollouts of a batch.
"""

from collections.abc import Sequence
from typing import Protocol

from blockroll.config import TrainConfig
from blockroll.rl_loops.advantages import Advantages, Scores
from blockroll.rl_loops.collect import Batch
from blockroll.rl_loops.losses import LossTokens, TokenLoss
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

    def loss(self, tokens: LossTokens, config: TrainConfig) -> TokenLoss:
        """The loss of a chunk's tokens, and its share of what an optimizer step divides its sum by.

        Options come from `config`; lengths and limits, where they count, from `tokens.rollouts`. Tokens that
        are not valid stay out. Sums and denominators of chunks add up to those of the batch. Rollouts of
        advantage 0 are asked for too, with the old log-probabilities as the learner's and without a gradient.
        """
        ...
