"""The token loss and the correction for the law that rollouts were drawn from.

Three laws meet here: the behaviour law mu that drew the tokens, the old policy pi_old as the learner
recomputes it before an update, and the policy pi that the optimizer moves. Only mu may stand in the
denominator of an importance weight.

Shapes: N completion tokens of all rollouts, one rollout after another.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockroll.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class BehaviorCorrection:
    """Importance weights pi_old / mu, before and after truncation."""

    weights_N: Tensor  # min(pi_old / mu, cap), without gradient; 1 where not valid
    is_valid_N: Tensor  # bool; False where either logprob is not finite
    num_dropped: int  # tokens that are not valid
    metrics: Mapping[str, float]  # `rollout_corr/*` before truncation, `rollout_corr/applied/*` after


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTokens:
    """Completion tokens of a chunk of rollouts, and what their loss is made from."""

    rollouts: Sequence[Rollout]  # whose tokens these are, in this order
    learner_logprobs_N: Tensor  # the only one that carries a gradient
    old_logprobs_N: Tensor
    weights_N: Tensor  # correct for the behaviour law
    advantages_N: Tensor  # of each token's rollout
    is_valid_N: Tensor  # bool; False leaves the loss


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoss:
    """The loss of a chunk's tokens, as a sum and what it is to be divided by. Chunks add up in both."""

    loss_sum: Tensor  # scalar; 0 without valid tokens
    denominator: float  # 0 where nothing counts
    num_tokens: int  # tokens in the sum
    num_dropped: int  # tokens left out because a logprob is not finite
    num_clipped: int  # tokens where the clip decides, and so takes the gradient away


def behavior_correction(
    old_logprobs_N: Tensor, behavior_logprobs_N: Tensor, *, cap: float
) -> BehaviorCorrection:
    """Truncated token weights of the old policy over the law that was really drawn from.

        w_t = pi_old(x_t) / mu(x_t),    applied: min(w_t, cap)

    The mean of w under mu is 1 when mu covers pi_old; truncation trades that for bounded variance.
    A non-finite logprob drops its token; it is never replaced by a number.
    Source: truncated importance sampling, Ionides 2008; metric names as in verl and TRL.
    """
    old, behavior = old_logprobs_N.detach().double(), behavior_logprobs_N.detach().double()
    is_valid_N = old.isfinite() & behavior.isfinite()
    log_weights = torch.where(is_valid_N, old - behavior, 0.0)
    raw_N = log_weights.exp()
    applied_N = raw_N.clamp(max=cap)
    return BehaviorCorrection(
        weights_N=applied_N.to(old_logprobs_N.dtype),
        is_valid_N=is_valid_N,
        num_dropped=int((~is_valid_N).sum()),
        metrics=_correction_metrics(log_weights[is_valid_N], raw_N[is_valid_N], applied_N[is_valid_N]),
    )


def token_loss(tokens: LossTokens, *, clip_epsilon: float) -> TokenLoss:
    """The clipped surrogate, weighted for the behaviour law, summed over valid tokens and divided by them.

        -min(rho A, clip(rho, 1 - eps, 1 + eps) A) * stopgrad(w),    rho = pi / pi_old

    Every token of the batch weighs the same, whatever the length of its rollout. A token whose learner
    or old logprob is not finite leaves sum and denominator alike.
    Source: PPO (arXiv 1707.06347), equation 7; DeepSeekMath (arXiv 2402.03300), equation 3.
    """
    is_used_N = tokens.is_valid_N & tokens.learner_logprobs_N.isfinite() & tokens.old_logprobs_N.isfinite()
    learner, old = tokens.learner_logprobs_N[is_used_N], tokens.old_logprobs_N[is_used_N].detach()
    advantages = tokens.advantages_N[is_used_N]
    ratios = (learner - old).exp()
    free = ratios * advantages
    clipped = ratios.clamp(1 - clip_epsilon, 1 + clip_epsilon) * advantages
    losses = -torch.minimum(free, clipped) * tokens.weights_N[is_used_N].detach()
    num_tokens = int(is_used_N.sum())
    return TokenLoss(
        loss_sum=losses.sum(),
        denominator=num_tokens,
        num_tokens=num_tokens,
        num_dropped=len(is_used_N) - num_tokens,
        num_clipped=int((clipped < free).sum()),
    )


def _correction_metrics(log_weights: Tensor, raw: Tensor, applied: Tensor) -> dict[str, float]:
    """Everything about the valid tokens of a batch; NaN without any."""
    if len(raw) == 0:
        none = torch.full((1,), math.nan, dtype=torch.float64)
        log_weights, raw, applied = none, none, none
    difference = log_weights.abs()
    return {
        **raw_weight_metrics(log_weights),
        **_weight_metrics("rollout_corr/applied/rollout_is", applied),
        "rollout_corr/applied/truncated_ratio": float((raw > applied).double().mean()),
        "sampling/sampling_logp_difference/mean": float(difference.mean()),
        "sampling/sampling_logp_difference/max": float(difference.max()),
    }


def raw_weight_metrics(log_weights_N: Tensor) -> dict[str, float]:
    """How far learner and behaviour law are apart, from log pi/mu of tokens, before any truncation."""
    raw = log_weights_N.exp()
    return {
        **_weight_metrics("rollout_corr/rollout_is", raw),
        "rollout_corr/kl": float(-log_weights_N.mean()),
        "rollout_corr/k3_kl": float((log_weights_N.expm1() - log_weights_N).mean()),
        "rollout_corr/chi2_token": float(raw.square().mean() - 1),
        "token_mult_prob_error": float(log_weights_N.abs().exp().mean()),
    }


def _weight_metrics(prefix: str, weights: Tensor) -> dict[str, float]:
    return {
        f"{prefix}_mean": float(weights.mean()),
        f"{prefix}_std": float(weights.std(correction=0)),
        f"{prefix}_min": float(weights.min()),
        f"{prefix}_max": float(weights.max()),
        f"{prefix}_eff_sample_size": float(weights.sum().square() / (len(weights) * weights.square().sum())),
    }
