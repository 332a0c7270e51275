"""The long experiments of part 2, in a short form."""

import json

import pytest

from benchmarks import evidence_part2 as evidence
from blockroll.types import Plan


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return evidence.trained_adapter(tmp_path_factory.mktemp("evidence") / "adapter", max_tokens=300)


def test_drafts_of_both_conversions_have_a_row_per_plan_and_law(adapter):
    rows = evidence.drafts(adapter, count=6, plans=(Plan(8), Plan(8, (0, 8))))
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


def test_fused_plans_have_the_equalities_of_part_one(adapter):
    rows = evidence.equality(adapter, count=2, short=800, whole=60)
    greedy, law = rows[:4], rows[4:]
    assert all(row["differing_rollouts_all_at_ties"] == 0 for row in greedy)
    assert all(row["p_value"] > 1e-4 for row in law)


def test_auto_has_rows_beside_plain_and_transformers(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "RUNS", tmp_path)
    monkeypatch.setenv("BLOCKROLL_CACHE", str(tmp_path))  # put back afterwards
    rows = evidence.auto(adapter, batches=(2,), repeats=1, rollouts=4)
    assert [row["plan"] for row in rows] == [
        "plain",
        "two_forward(8)",
        "fused(8,[0,8])",
        "auto",
        "transformers_generate",
    ]
    assert list((tmp_path / "cache" / "plans").glob("*.json"))


def test_every_variant_learns_from_the_law_it_was_drawn_from(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "RUNS", tmp_path)
    rows = evidence.learning(adapter, seeds=(0,), steps=1, prompts_per_step=2, held_out=4, eval_prompts=4)
    assert [row["variant"] for row in rows if "held_out_reward" in row] == list(evidence.VARIANTS)
    by_variant = {row["variant"]: row for row in rows if "step" in row}
    assert list(by_variant) == list(evidence.VARIANTS)
    for variant, row in by_variant.items():
        is_mixed = variant.startswith("mixed")
        assert (row["rollout/effective_sample_size"] < 1 - 1e-6) <= is_mixed
    assert by_variant["lossless"]["policy_version"] == 0


def test_a_conversion_has_a_row_of_what_it_took_and_learned(adapter):
    row = evidence.conversion_row(adapter)
    assert row["tokens"] >= 300
    assert row["minutes"] > 0
    rounds = row["acceptance_by_round"]
    assert rounds.keys() == {"two_forward", "fused"}
    assert all(len(acceptance_K) == 8 for layout in rounds.values() for acceptance_K in layout)
    json.dumps(row)
