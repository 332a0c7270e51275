"""Log-probabilities that other engines reported wrongly, each as a check and as a planted bug.

Shapes: B requests, N uniforms, K drafted tokens, L = K + 1 target positions, V vocabulary.
"""

import dataclasses
import math

import pytest
import torch

from blockroll.config import RolloutConfig, RunConfig
from blockroll.errors import ConfigError
from blockroll.rl_loops.run import rollout_sampling
from blockroll.rollout.engine import step as decoding
from blockroll.rollout.engine.running import RunningRequest
from blockroll.samplers.laws import Laws
from blockroll.types import Plan, Sampling
from tests.law.known_failures import (
    FUSED,
    TWO_FORWARD,
    causal_logits,
    failure,
    sample,
)


def reports_the_processed_law_as_the_policys(monkeypatch):
    monkeypatch.setattr(Laws, "policy_logprobs", lambda laws, logits, verdict: verdict.behavior_logprobs_BL)


@failure(19, reports_the_processed_law_as_the_policys)
def raw_and_processed_logprobs_are_each_what_they_say():
    policy, rollouts, _ = sample(temperature=0.7, top_k=5)
    for rollout in rollouts:
        scaled = causal_logits(policy, rollout) / 0.7
        ids = torch.tensor(rollout.token_ids)[:, None]
        raw = scaled.log_softmax(-1).gather(1, ids).flatten()
        kept = scaled.topk(5).values.logsumexp(-1)
        assert torch.allclose(torch.tensor(rollout.policy_logprobs).double(), raw, atol=1e-4)
        processed = scaled.gather(1, ids).flatten() - kept
        assert torch.allclose(torch.tensor(rollout.behavior_logprobs).double(), processed, atol=1e-3)


def takes_truncation_for_none(monkeypatch):
    monkeypatch.setattr(Sampling, "is_truncated", property(lambda sampling: False))


@failure(20, takes_truncation_for_none)
def a_correction_that_truncation_would_bias_is_refused():
    for options in ({"top_p": 0.8}, {"top_k": 4}, {"min_p": 0.2}):
        with pytest.raises(ConfigError, match="average to the mass that is left"):
            rollout_sampling(RunConfig(rollout=RolloutConfig(**options)))


def loses_a_logprob(monkeypatch):
    commit = RunningRequest.commit

    def forgetful(running, token_ids, is_draft, policy, *others, **step):
        return commit(running, token_ids, is_draft, policy[: max(1, len(policy) - 1)], *others, **step)

    monkeypatch.setattr(RunningRequest, "commit", forgetful)


@failure(26, loses_a_logprob)
def every_column_has_an_entry_per_token():
    for plan in (Plan(0), TWO_FORWARD, FUSED):
        for rollout in sample(plan)[1]:
            columns = (rollout.policy_logprobs, rollout.behavior_logprobs, rollout.policy_versions)
            assert {len(column) for column in columns} == {len(rollout.token_ids)}


def wrong_verdicts(monkeypatch, change):
    """Both places that verify, with what they report changed."""
    for name in ("verify_block", "settle_first"):
        original = getattr(decoding, name)
        monkeypatch.setattr(
            decoding,
            name,
            lambda draft, probs, coins, original=original: change(original(draft, probs, coins), probs),
        )


def reports_zero(monkeypatch):
    wrong_verdicts(
        monkeypatch,
        lambda verdict, _: dataclasses.replace(
            verdict, behavior_logprobs_BL=torch.zeros_like(verdict.behavior_logprobs_BL)
        ),
    )


@failure(27, reports_zero)
def mean_surprisal_is_mean_entropy():
    """Also what a silently greedy sampler would fail (39): its tokens surprise too little."""
    for plan in (Plan(0), TWO_FORWARD, FUSED):
        _, rollouts, rows = sample(plan, count=40)
        entropies = torch.stack([-(row * row.log()).sum() for _, row in rows])
        spread = torch.stack([(row * row.log() ** 2).sum() for _, row in rows]) - entropies**2
        surprisal = -math.fsum(value for rollout in rollouts for value in rollout.behavior_logprobs)
        num_tokens = sum(len(rollout.token_ids) for rollout in rollouts)
        # Rows of tokens that a length cut off are few: they are in the sum of entropies by their mean.
        expected = entropies.mean().item() * num_tokens
        assert abs(surprisal - expected) < 5 * math.sqrt(spread.mean().item() * num_tokens)


def reports_the_row_behind(monkeypatch):
    def shifted(verdict, probs):
        logprobs = probs.dense().roll(-1, dims=1)[:, : verdict.token_ids_BL.shape[1]]
        return dataclasses.replace(
            verdict,
            behavior_logprobs_BL=logprobs.gather(-1, verdict.token_ids_BL[..., None]).squeeze(-1).log(),
        )

    wrong_verdicts(monkeypatch, shifted)


@failure(28, reports_the_row_behind)
def logprobs_of_a_busy_batch_are_those_of_the_text():
    for plan in (TWO_FORWARD, FUSED):
        policy, rollouts, _ = sample(plan)
        assert any(rollout.stats.num_accepted < rollout.stats.num_drafted for rollout in rollouts)
        for rollout in rollouts:
            ids = torch.tensor(rollout.token_ids)[:, None]
            fresh = causal_logits(policy, rollout).log_softmax(-1).gather(1, ids).flatten()
            assert torch.allclose(torch.tensor(rollout.behavior_logprobs).double(), fresh, atol=1e-4)
