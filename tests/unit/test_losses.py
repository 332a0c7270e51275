"""The token loss and its correction on small tables worked out by hand."""

import math

import pytest
import torch

from blockroll.rl_loops.losses import LossTokens, behavior_correction, token_loss

NAN = math.nan


def logs(*probs):
    return torch.tensor(probs, dtype=torch.float64).log()


def loss_of(learner, old, weights, advantages, valid=None, clip_epsilon=0.2):
    weights, advantages = (
        torch.tensor(weights, dtype=torch.float64),
        torch.tensor(advantages, dtype=torch.float64),
    )
    valid = torch.ones(len(old), dtype=torch.bool) if valid is None else torch.tensor(valid)
    return token_loss(tokens(learner, old, weights, advantages, valid), clip_epsilon=clip_epsilon)


def tokens(learner, old, weights, advantages, valid):
    return LossTokens(
        rollouts=(),
        learner_logprobs_N=learner,
        old_logprobs_N=old,
        weights_N=weights,
        advantages_N=advantages,
        is_valid_N=valid,
    )


def mean(result):
    return result.loss_sum / result.denominator


def test_at_ratio_one_the_loss_is_minus_the_mean_of_advantage_times_weight():
    old = logs(0.5, 0.25, 0.1)
    result = loss_of(old.clone(), old, [1.0, 2.0, 0.5], [1.0, -1.0, 4.0])
    assert float(mean(result).detach()) == pytest.approx(-(1.0 - 2.0 + 2.0) / 3, abs=1e-12)
    assert (result.num_tokens, result.num_dropped, result.num_clipped) == (3, 0, 0)


def test_the_clip_holds_back_only_moves_that_the_advantage_asks_for():
    # Ratios 2, 0.5, 2, 0.5: clipped are the rise with A > 0 and the fall with A < 0.
    learner = logs(0.5, 0.25, 0.5, 0.25).requires_grad_()
    old = logs(0.25, 0.5, 0.25, 0.5)
    result = loss_of(learner, old, [1.0] * 4, [1.0, 1.0, -1.0, -1.0])
    assert float(mean(result).detach()) == pytest.approx(-(1.2 + 0.5 - 2.0 - 0.8) / 4, abs=1e-12)
    assert result.num_clipped == 2
    mean(result).backward()
    assert learner.grad.tolist() == pytest.approx([0.0, -0.5 / 4, 2.0 / 4, 0.0], abs=1e-12)


def test_no_gradient_flows_through_weights_or_old_logprobs():
    learner, old = logs(0.5, 0.5).requires_grad_(), logs(0.4, 0.5).requires_grad_()
    weights = torch.ones(2, dtype=torch.float64, requires_grad=True)
    valid = torch.ones(2, dtype=torch.bool)
    mean(token_loss(tokens(learner, old, weights, torch.ones(2), valid), clip_epsilon=0.9)).backward()
    assert learner.grad is not None
    assert old.grad is None
    assert weights.grad is None


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_a_non_finite_logprob_leaves_sum_and_denominator_and_gradient(bad):
    learner = torch.tensor([math.log(0.5), bad, math.log(0.25)], dtype=torch.float64, requires_grad=True)
    old = logs(0.5, 0.5, 0.25)
    result = loss_of(learner, old, [1.0, 1.0, 1.0], [3.0, 100.0, 1.0])
    assert float(mean(result).detach()) == pytest.approx(-(3.0 + 1.0) / 2, abs=1e-12)
    assert (result.num_tokens, result.num_dropped) == (2, 1)
    mean(result).backward()
    assert learner.grad.tolist() == pytest.approx([-1.5, 0.0, -0.5], abs=1e-12)


def test_tokens_that_are_not_valid_are_counted_and_without_any_the_loss_is_zero():
    old = logs(0.5, 0.25)
    assert loss_of(old, old, [1.0, 1.0], [1.0, 5.0], valid=[True, False]).num_dropped == 1
    nothing = loss_of(old, old, [1.0, 1.0], [1.0, 5.0], valid=[False, False])
    assert (float(nothing.loss_sum), nothing.denominator, nothing.num_tokens) == (0.0, 0, 0)
    assert nothing.num_clipped == 0


@pytest.mark.failure(21)
def test_truncation_is_visible_before_and_after():
    # Weights 4, 1 and 1/2, capped at 2.
    correction = behavior_correction(logs(0.8, 0.5, 0.25), logs(0.2, 0.5, 0.5), cap=2.0)
    assert correction.weights_N.tolist() == pytest.approx([2.0, 1.0, 0.5])
    metrics = correction.metrics
    assert metrics["rollout_corr/rollout_is_mean"] == pytest.approx(5.5 / 3)
    assert metrics["rollout_corr/rollout_is_max"] == pytest.approx(4.0)
    assert metrics["rollout_corr/rollout_is_min"] == pytest.approx(0.5)
    assert metrics["rollout_corr/rollout_is_std"] == pytest.approx(math.sqrt(17.25 / 3 - (5.5 / 3) ** 2))
    assert metrics["rollout_corr/rollout_is_eff_sample_size"] == pytest.approx(5.5**2 / (3 * 17.25))
    assert metrics["rollout_corr/applied/rollout_is_mean"] == pytest.approx(3.5 / 3)
    assert metrics["rollout_corr/applied/rollout_is_max"] == pytest.approx(2.0)
    assert metrics["rollout_corr/applied/rollout_is_eff_sample_size"] == pytest.approx(3.5**2 / (3 * 5.25))
    assert metrics["rollout_corr/applied/truncated_ratio"] == pytest.approx(1 / 3)


def test_divergences_follow_their_definitions():
    metrics = behavior_correction(logs(0.8, 0.25), logs(0.2, 0.5), cap=2.0).metrics
    log4, log2 = math.log(4), math.log(2)
    assert metrics["rollout_corr/kl"] == pytest.approx((-log4 + log2) / 2)
    assert metrics["rollout_corr/k3_kl"] == pytest.approx(((4 - 1 - log4) + (0.5 - 1 + log2)) / 2)
    assert metrics["rollout_corr/chi2_token"] == pytest.approx((16 + 0.25) / 2 - 1)
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx((log4 + log2) / 2)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(log4)
    assert metrics["token_mult_prob_error"] == pytest.approx(3.0)


def test_equal_laws_give_weight_one_and_no_divergence():
    metrics = behavior_correction(logs(0.3, 0.6), logs(0.3, 0.6), cap=2.0).metrics
    assert metrics["rollout_corr/rollout_is_mean"] == 1.0
    assert metrics["rollout_corr/rollout_is_eff_sample_size"] == 1.0
    assert metrics["rollout_corr/kl"] == metrics["rollout_corr/k3_kl"] == 0.0


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_a_non_finite_behavior_logprob_is_dropped_and_counted(bad):
    behavior = torch.tensor([math.log(0.5), bad], dtype=torch.float64)
    correction = behavior_correction(logs(0.5, 0.5), behavior, cap=2.0)
    assert correction.is_valid_N.tolist() == [True, False]
    assert correction.num_dropped == 1
    assert correction.metrics["rollout_corr/rollout_is_mean"] == 1.0


def test_a_batch_without_tokens_has_metrics_that_say_so():
    metrics = behavior_correction(logs(), logs(), cap=2.0).metrics
    assert math.isnan(metrics["rollout_corr/kl"])
    assert math.isnan(metrics["sampling/sampling_logp_difference/max"])
