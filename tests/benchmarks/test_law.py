"""A short form of every experiment on the law, and a planted bug that the two-sample test must see."""

from benchmarks import law
from blockroll.kernels.block_verify import reference


def test_greedy_two_forward_equals_greedy_plain_on_the_shipped_policy(policy):
    (row,) = law.greedy_equality(policy, count=24)
    assert row["differing_rollouts_all_at_ties"] <= 1
    assert row["acceptance_rate"] > 0.3


def test_recorded_logprobs_equal_a_fresh_forward_on_the_shipped_policy(policy):
    rows = law.logprob_equality(policy, count=24)
    assert {row["plan"] for row in rows} == {"plain", "two_forward(8)"}
    assert all(0 < row["max_difference"] < 1e-4 for row in rows)


def test_two_forward_and_plain_agree_in_law_on_texts_lengths_and_rewards(policy):
    for row in law.law_equality(policy, short=1500, whole=150):
        assert row["p_value"] > 1e-3, row


def test_the_two_sample_test_sees_a_final_token_drawn_from_the_target(policy, monkeypatch):
    monkeypatch.setattr(reference, "_residual", lambda target, *_: target)
    texts, *_ = law.law_equality(policy, short=1500, whole=150)
    assert texts["p_value"] < 1e-6


def test_fused_plans_have_the_equalities_of_two_forward(adapter):
    rows = law.fused_equality(adapter, count=2, short=800, whole=60)
    greedy, samples = rows[:4], rows[4:]
    assert sum(row["differing_rollouts_all_at_ties"] for row in greedy) <= 1
    assert all(row["p_value"] > 1e-4 for row in samples)
