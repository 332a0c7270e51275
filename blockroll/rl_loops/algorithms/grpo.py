"""GRPO: the reward against the group's other rollouts, and the clipped token loss.

Source: DeepSeekMath (arXiv 2402.03300), without the KL term to a reference policy.
"""

from collections.abc import Sequence

from blockroll.config import TrainConfig
from blockroll.rl_loops.advantages import Advantages, Scores, group_advantages, score_rollouts
from blockroll.rl_loops.collect import Batch
from blockroll.rl_loops.losses import LossTokens, TokenLoss, token_loss
from blockroll.rl_loops.tasks import RewardFunction


class GRPO:
    """The phases of `Algorithm`."""

    name = "grpo"

    def score(self, reward_fn: RewardFunction, batch: Batch) -> Scores:
        """The task's reward of each whole text."""
        return score_rollouts(reward_fn, batch.rows, batch.rollouts, batch.completions)

    def advantages(self, scores: Scores, group_ids: Sequence[str]) -> Advantages:
        """Rewards less their group's mean, over its standard deviation; `advantages.group_advantages`."""
        return group_advantages(scores.rewards_B, group_ids)

    def loss(self, tokens: LossTokens, config: TrainConfig) -> TokenLoss:
        """The clipped surrogate as a mean over valid tokens; `losses.token_loss`."""
        return token_loss(tokens, clip_epsilon=config.clip_epsilon)
