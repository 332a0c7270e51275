"""A short form of the experiments on drafts."""

import json

from benchmarks import drafts, history
from blockroll.policies.loading import TINY_POLICY_DIR
from blockroll.types import Plan


def test_drafts_of_both_conversions_have_a_row_per_plan_and_law(adapter):
    rows = drafts.conversions(adapter, count=6, plans=(Plan(8), Plan(8, (0, 8))))
    assert [(row["conversion"], row["plan"], row["law"]) for row in rows] == [
        ("full", "two_forward(8)", "target"),
        ("full", "two_forward(8)", "mixed(0.5)"),
        ("adapter", "two_forward(8)", "target"),
        ("adapter", "two_forward(8)", "mixed(0.5)"),
        ("adapter", "fused(8,[0,8])", "target"),
        ("adapter", "fused(8,[0,8])", "mixed(0.5)"),
    ]
    for row in rows:
        assert len(row["acceptance_by_position"]) == 8
        is_lossless = row["law"] == "target"
        assert (row["log_ratio_std"] < 1e-6) == is_lossless
        assert (row["effective_sample_size"] > 1 - 1e-6) == is_lossless
    json.dumps(rows)


def test_a_conversion_has_a_row_of_what_it_took_and_learned(adapter):
    row = drafts.conversion_row(adapter)
    assert row["tokens"] >= 300
    assert row["minutes"] > 0
    rounds = row["acceptance_by_round"]
    assert rounds.keys() == {"two_forward", "fused"}
    assert all(len(acceptance_K) == 8 for layout in rounds.values() for acceptance_K in layout)
    json.dumps(row)


def test_drafts_from_history_have_a_row_per_temperature_and_epoch():
    rows = history.arithmetic(TINY_POLICY_DIR, count=2, siblings=3, max_tokens=24, dtype="float32")
    assert [(row["temperature"], row["epoch"]) for row in rows] == [(0.7, 1), (0.7, 2), (1.0, 1), (1.0, 2)]
    for row in rows:
        assert row["tokens_per_step"] == row["tokens"] / row["steps"] >= 1
        assert 0 <= row["acceptance_rate"] <= 1
    json.dumps(rows)
