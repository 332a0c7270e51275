"""A short form of every long experiment of part 1, and a planted bug that the two-sample test must see."""

import pytest

from benchmarks import evidence_part1 as evidence
from blockroll.policies.hf import HFPolicy
from blockroll.samplers import lossless


@pytest.fixture(scope="module")
def policy():
    return HFPolicy.from_pretrained("tiny")


def test_greedy_two_forward_equals_greedy_plain_on_the_shipped_policy(policy):
    (row,) = evidence.greedy_equality(policy, count=24)
    assert row["differing_rollouts_all_at_ties"] == 0
    assert row["acceptance_rate"] > 0.3


def test_recorded_logprobs_equal_a_fresh_forward_on_the_shipped_policy(policy):
    rows = evidence.logprob_equality(policy, count=24)
    assert {row["plan"] for row in rows} == {"plain", "two_forward(8)"}
    assert all(0 < row["max_difference"] < 1e-4 for row in rows)


def test_two_forward_and_plain_agree_in_law_on_texts_lengths_and_rewards(policy):
    for row in evidence.law_equality(policy, short=1500, whole=150):
        assert row["p_value"] > 1e-3, row


def test_the_two_sample_test_sees_a_final_token_drawn_from_the_target(policy, monkeypatch):
    monkeypatch.setattr(lossless, "_final_weights", lambda target, draft, *, is_rejected_B: target)
    texts, *_ = evidence.law_equality(policy, short=1500, whole=150)
    assert texts["p_value"] < 1e-6


def test_speed_rows_hold_every_subject(policy):
    rows = evidence.speed(policy, batches=(2,), repeats=1)
    assert [row["plan"] for row in rows] == ["plain", "two_forward(8)", "transformers_generate"]
    assert all(row["tokens_per_s"] > 0 for row in rows)


def test_learning_runs_go_on_from_their_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "RUNS", tmp_path)
    rows = evidence.learning(seeds=(0,), stages=(1,), prompts_per_step=2)
    assert [(row["plan_config"], row["step"]) for row in rows] == [("plain", 1), ("two_forward", 1)]
    rows = evidence.learning(seeds=(0,), stages=(1, 2), prompts_per_step=2)
    assert [(row["plan_config"], row["step"]) for row in rows] == [
        ("plain", 1),
        ("plain", 2),
        ("two_forward", 1),
        ("two_forward", 2),
    ]
