"""GRPO: group advantages and the clipped token loss, and the table of all algorithms.

An algorithm is an advantage function and a loss; everything else of the loop is shared.
Source: DeepSeekMath (arXiv 2402.03300), without the KL term to a reference policy.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from blockroll.rl_loops.advantages import Advantages, group_advantages
from blockroll.rl_loops.losses import TokenLoss, token_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """What tells one policy-gradient method from another."""

    name: str
    advantages: Callable[[Tensor, Sequence[str]], Advantages]  # (rewards_B, group ids)
    loss: Callable[..., TokenLoss]  # the signature of `losses.token_loss`


GRPO = Algorithm(name="grpo", advantages=group_advantages, loss=token_loss)

ALGORITHMS: Mapping[str, Algorithm] = {algorithm.name: algorithm for algorithm in (GRPO,)}
