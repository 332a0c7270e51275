"""The learner on a tiny random model: its log-probabilities, its steps and its state."""

import copy
import dataclasses
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from blockroll.config import TrainConfig
from blockroll.errors import CheckpointError, InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.advantages import Advantages
from blockroll.rl_loops.algorithms import GRPO
from blockroll.rl_loops.learner import Learner, length_chunks
from blockroll.types import Law, Request, Rollout, RolloutStats, Sampling
from tests.equality import assert_same_rows, assert_same_weights

VOCAB = 23


def tiny_policy(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return HFPolicy(LlamaForCausalLM(config).to(dtype))


def learner(seed=0, **options):
    options = {"learning_rate": 1e-2, "warmup_steps": 0, "learner_threads": 1, **options}
    return Learner(tiny_policy(seed), TrainConfig(**options), GRPO())


def rollout(prompt_ids, token_ids, behavior_logprobs=None, temperature=1.0):
    behavior_logprobs = behavior_logprobs or (-math.log(VOCAB),) * len(token_ids)
    return Rollout(
        request=Request(
            request_id="r", prompt_ids=tuple(prompt_ids), seed=0, sampling=Sampling(temperature=temperature)
        ),
        token_ids=tuple(token_ids),
        policy_logprobs=tuple(behavior_logprobs),
        behavior_logprobs=tuple(behavior_logprobs),
        policy_versions=(0,) * len(token_ids),
        law=Law(),
        finish_reason="stop",
        stats=RolloutStats(),
    )


BATCH = [
    rollout([1, 5, 6], [7, 8, 9, 2]),
    rollout([1, 5], [10, 2]),
    rollout([1, 5, 6, 11, 12], [13], temperature=0.5),
    rollout([1], [3, 4, 5, 6, 7, 8]),
]


def worth(*values, valid=None):
    advantages = torch.tensor(values)
    valid = torch.ones(len(values), dtype=torch.bool) if valid is None else torch.tensor(valid)
    return Advantages(
        advantages_B=advantages, is_valid_B=valid, reward_mean=0.0, reward_std=1.0, frac_zero_std=0.0
    )


def on_policy(subject, batch):
    """The batch with the learner's own log-probabilities as its behaviour law."""
    sizes = [len(each.token_ids) for each in batch]
    parts = subject.logprobs(batch).logprobs_N.split(sizes)
    return [
        rollout(each.request.prompt_ids, each.token_ids, part.tolist(), each.request.sampling.temperature)
        for each, part in zip(batch, parts, strict=True)
    ]


def weights(subject):
    return {name: tensor.clone() for name, tensor in subject.named_tensors()}


def test_padded_logprobs_equal_a_plain_forward_of_each_text_at_its_temperature():
    subject = learner()
    got = subject.logprobs(BATCH)
    expected, entropies = [], []
    for each in BATCH:
        ids = torch.tensor([each.request.prompt_ids + each.token_ids])
        with torch.no_grad():
            logits = subject.model(ids).logits[0, len(each.request.prompt_ids) - 1 : -1]
        law = (logits / each.request.sampling.logprob_temperature).log_softmax(-1)
        expected += law[torch.arange(len(each.token_ids)), torch.tensor(each.token_ids)].tolist()
        entropies += (-(law.exp() * law).sum(-1)).tolist()
    assert got.logprobs_N.tolist() == pytest.approx(expected, abs=1e-5)
    assert got.entropies_N.tolist() == pytest.approx(entropies, abs=1e-5)


def test_greedy_rollouts_are_scored_at_temperature_one():
    greedy, plain = rollout([1, 5], [7, 2], temperature=0.0), rollout([1, 5], [7, 2])
    subject = learner()
    torch.testing.assert_close(*(subject.logprobs([each]).logprobs_N for each in (greedy, plain)))


def test_chunks_hold_every_rollout_once_and_keep_their_bound():
    chunks = length_chunks(BATCH, max_positions=14)
    assert sorted(i for chunk in chunks for i in chunk) == [0, 1, 2, 3]
    lengths = [len(each.request.prompt_ids) + len(each.token_ids) for each in BATCH]
    assert all(len(chunk) * max(lengths[i] for i in chunk) <= 14 for chunk in chunks)
    assert length_chunks([]) == []


def test_the_gradient_does_not_depend_on_how_a_batch_is_chunked(monkeypatch):
    whole, chunked = learner(), learner()
    advantages = worth(1.0, -1.0, 0.5, -0.5)
    whole_metrics = whole.update(on_policy(whole, BATCH), advantages)
    monkeypatch.setattr(
        "blockroll.rl_loops.learner.length_chunks", lambda rollouts: [[i] for i in range(len(rollouts))]
    )
    chunked_metrics = chunked.update(on_policy(chunked, BATCH), advantages)
    assert chunked_metrics["grad_norm"] == pytest.approx(whole_metrics["grad_norm"], rel=1e-4)
    assert chunked_metrics["loss"] == pytest.approx(whole_metrics["loss"], abs=1e-6)


class EveryRolloutWeighsTheSame(GRPO):
    """An algorithm that divides by rollouts: those of no advantage are among them."""

    def loss(self, tokens, config):
        result = super().loss(tokens, config)
        sizes = torch.tensor([len(each.token_ids) for each in tokens.rollouts])
        losses_N = -(tokens.learner_logprobs_N - tokens.old_logprobs_N).exp() * tokens.advantages_N
        mean_B = torch.stack([part.mean() for part in losses_N.split(sizes.tolist())])
        return dataclasses.replace(result, loss_sum=mean_B.sum(), denominator=len(sizes))


@pytest.mark.parametrize("is_chunked", [False, True])
def test_an_algorithm_says_what_its_loss_is_divided_by(monkeypatch, is_chunked):
    if is_chunked:
        monkeypatch.setattr(
            "blockroll.rl_loops.learner.length_chunks", lambda rollouts: [[i] for i in range(len(rollouts))]
        )
    subject = learner()
    subject.algorithm = EveryRolloutWeighsTheSame()
    metrics = subject.update(on_policy(subject, BATCH), worth(1.0, 0.0, 2.0, 0.5))
    assert metrics["loss"] == pytest.approx(-(1.0 + 2.0 + 0.5) / 4, abs=1e-5)
    assert metrics["update/num_tokens"] == 13


def test_an_update_makes_good_rollouts_likelier_and_bad_ones_less_likely():
    subject = learner()
    batch = on_policy(subject, BATCH[:2])
    before = subject.logprobs(batch).logprobs_N
    metrics = subject.update(batch, worth(1.0, -1.0))
    change = subject.logprobs(batch).logprobs_N - before
    assert change[:4].sum() > 0
    assert change[4:].sum() < 0
    assert metrics["rollout_corr/rollout_is_mean"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["loss"] == pytest.approx(-(4 - 2) / 6, abs=1e-5)
    assert metrics["clip_ratio"] == 0.0


def test_rollouts_without_a_valid_advantage_do_not_touch_the_update():
    with_failures, without = learner(), learner()
    with_failures.update(BATCH, worth(1.0, 0.0, -1.0, 0.0, valid=[True, False, True, False]))
    without.update([BATCH[0], BATCH[2]], worth(1.0, -1.0))
    assert_same_weights(weights(without), weights(with_failures))


@pytest.mark.parametrize("advantages", [worth(0.0, 0.0, valid=[False, False]), worth(0.0, 0.0)])
def test_a_batch_that_teaches_nothing_leaves_the_weights_alone(advantages):
    subject = learner()
    before = weights(subject)
    subject.update(BATCH[:2], advantages)
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.named_tensors())


def test_rollouts_of_no_advantage_count_in_the_mean_but_cost_no_forward(monkeypatch):
    subject, forwards = learner(), []
    forward = Learner._forward
    monkeypatch.setattr(
        Learner,
        "_forward",
        lambda self, rollouts, **asked: forwards.append(rollouts) or forward(self, rollouts, **asked),
    )
    batch = on_policy(subject, BATCH)
    forwards.clear()
    metrics = subject.update(batch, worth(1.0, 0.0, 0.0, 0.0))

    old, teaching = forwards
    assert (len(old), len(teaching)) == (4, 1)
    assert metrics["update/num_tokens"] == 13
    assert metrics["loss"] == pytest.approx(-4 / 13, abs=1e-5)


def test_non_finite_behavior_logprobs_are_dropped_and_counted():
    broken = rollout([1, 5, 6], [7, 8, 9, 2], (-3.0, math.nan, -math.inf, -3.0))
    metrics = learner().update([broken, BATCH[1]], worth(1.0, -1.0))
    assert metrics["update/dropped_tokens"] == 2
    assert metrics["update/num_tokens"] == 4
    assert math.isfinite(metrics["grad_norm"])


def test_a_gradient_that_is_not_finite_skips_the_step_and_says_so(caplog):
    subject = learner()
    before = weights(subject)
    metrics = subject.update(BATCH[:2], worth(math.inf, -1.0))
    assert metrics["update/skipped_total"] == 1
    assert not math.isfinite(metrics["grad_norm"])
    assert "NonFiniteGradient" in caplog.text
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.named_tensors())


def test_minibatches_take_one_optimizer_step_each_and_never_more_than_rollouts():
    subject = learner(minibatches=2)
    subject.update(BATCH, worth(1.0, -1.0, 1.0, -1.0))
    assert subject.num_optimizer_steps == 2
    subject.update(BATCH[:1], worth(1.0))
    assert subject.num_optimizer_steps == 3


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant", [0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1, 0.1]),
        ("linear", [0.025, 0.05, 0.075, 0.1, 0.1, 0.075, 0.05, 0.025]),
    ],
)
def test_the_learning_rate_warms_up_and_then_stays_or_falls_to_nothing(scheduler, expected):
    subject = learner(learning_rate=0.1, warmup_steps=4, steps=8, lr_scheduler=scheduler)
    rates = [subject.update(BATCH, worth(1.0, -1.0, 1.0, -1.0))["learning_rate"] for _ in expected]
    assert rates == pytest.approx(expected)
    assert subject.learning_rate == pytest.approx(0.1 if scheduler == "constant" else 0)


def test_the_gradient_is_clipped_to_its_bound():
    subject = learner(max_grad_norm=1e-3)
    metrics = subject.update(BATCH, worth(10.0, -10.0, 10.0, -10.0))
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in subject.model.parameters()))
    assert metrics["grad_norm"] > 1e-3
    assert norm == pytest.approx(1e-3, rel=1e-2)


def test_a_reloaded_learner_goes_on_as_if_it_had_not_been(tmp_path):
    subject, other = learner(warmup_steps=5), learner(seed=1, warmup_steps=5)
    advantages = worth(1.0, -1.0, 0.5, -0.5)
    subject.update(BATCH, advantages)
    other.model.load_state_dict(subject.model.state_dict())
    other.load_state_dict(copy.deepcopy(subject.state_dict()))
    assert_same_rows(*(each.update(BATCH, advantages) for each in (subject, other)))
    assert_same_weights(weights(subject), weights(other))


def test_a_state_that_lacks_a_part_is_refused_by_name():
    subject = learner()
    state = {key: value for key, value in subject.state_dict().items() if key != "optimizer"}
    with pytest.raises(CheckpointError, match="lacks optimizer"):
        subject.load_state_dict(state)


def test_weights_that_are_not_float32_are_refused():
    with pytest.raises(InvalidInput, match="must be float32"):
        Learner(tiny_policy(dtype=torch.bfloat16), TrainConfig(), GRPO())


def test_the_learner_gives_the_process_its_threads_back():
    before = torch.get_num_threads()
    learner(learner_threads=before + 1).logprobs(BATCH)
    assert torch.get_num_threads() == before


def test_without_correction_the_behavior_law_moves_nothing_and_is_still_reported():
    """Two batches that differ in behaviour logprobs alone."""
    odd = [dataclasses.replace(r, behavior_logprobs=tuple(x - 0.5 for x in r.policy_logprobs)) for r in BATCH]
    weights, metrics = [], []
    for corrected, batch in ((False, BATCH), (False, odd), (True, odd)):
        subject = learner(importance_sampling_correction=corrected)
        metrics.append(subject.update(batch, worth(1.0, -1.0, 1.0, -1.0)))
        weights.append(torch.cat([p.detach().flatten() for p in subject.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=0)
    assert (weights[1] - weights[2]).abs().max() > 1e-4
    name = "rollout_corr/rollout_is_mean"
    assert metrics[1][name] == pytest.approx(metrics[2][name]) != pytest.approx(metrics[0][name])
