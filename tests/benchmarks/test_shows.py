"""Short forms of the experiments in turns: equality, the grid of the planner, the long tail."""

import json

import pytest

from benchmarks import equality, grid, grouped, longtail, readme_shows, turns
from benchmarks.cells import GIVEN
from benchmarks.history import groups
from benchmarks.workload import prompts
from blockroll.policies.loading import TINY_POLICY_DIR
from blockroll.types import Sampling


@pytest.fixture(autouse=True)
def runs_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "RUNS", tmp_path)
    monkeypatch.setattr(longtail, "RUNS", tmp_path)
    monkeypatch.setenv("BLOCKROLL_CACHE", str(tmp_path / "cache"))  # and put back after them


def test_every_way_to_decode_is_compared_with_plain_rollouts(adapter, tmp_path):
    rows = equality.equality(
        adapter, count=12, greedy=4, plans=("plain", "two_forward(8)"), backend="local", folder=tmp_path
    )
    assert [(row["plan"], row["how"], row["rollouts"]) for row in rows] == [
        ("plain", "alone", 12),
        ("plain", "batch 7", 12),
        ("plain", "aborted and gone on with", 12),
        ("plain", "two replicas", 12),
        ("two_forward(8)", "alone", 12),
        ("two_forward(8)", "batch 7", 12),
        ("two_forward(8)", "batch 64", 12),
        ("two_forward(8)", "batch 7", 4),
        ("two_forward(8)", "aborted and gone on with", 12),
        ("two_forward(8)", "two replicas", 12),
    ]
    assert all(row["different"] == 0 for row in rows if row["plan"] == "plain" or row["temperature"] == 0)
    assert all(row["largest_logprob_gap"] < 1e-4 for row in rows)
    json.dumps(rows)
    assert "| plain | alone | 12 | 1 |" in readme_shows.equality_table(rows)
    assert "rollouts under 2 plans" in readme_shows.equality_finding(rows)


def test_rollouts_of_another_seed_are_counted_as_different(adapter):
    ways = equality.Ways(adapter, equality.wanted(equality.causal_part(adapter), 4))
    others = equality.Ways(adapter, [*ways.requests])
    others.requests = [
        type(each)(**{name: getattr(each, name) for name in each.__slots__} | {"seed": each.seed + 1})
        for each in ways.requests
    ]
    row = equality.compared(ways.plain, others.plain, ways.policy)
    assert row["different"] > 0
    assert "coins keep" in row["named"][0]


def test_a_cell_of_the_grid_has_fixed_plans_auto_with_its_regret_and_generate(adapter, tmp_path):
    rows = grid.grid(adapter, batches=(2,), contexts=(64, 96), repeats=2, folder=tmp_path)
    as_taught, rows = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert {row["prompt_tokens"] < 20 for row in as_taught if "prompt_tokens" in row} == {True}
    plain = next(row for row in as_taught if row["plan"] == turns.PLAIN)
    assert plain["num_tokens"] < 2 * 16 * 64  # texts end where they end
    assert [row["plan"] for row in rows] == [*grid.FIXED, "auto", turns.AGAIN, "transformers_generate"]
    chosen = next(row for row in rows if row["plan"] == "auto")
    assert chosen["regret_low"] <= chosen["regret"] <= chosen["regret_high"]
    assert chosen["predicted_over_achieved"] > 0
    assert chosen["best_fixed"] in grid.FIXED
    assert rows[-1]["auto_over_it_low"] <= rows[-1]["auto_over_it"]
    assert {row["prompt_tokens"] for row in rows} == {96}
    assert {row["num_tokens"] for row in rows} == {2 * 4 * 64}
    json.dumps(rows)
    assert "| 96 | 2 | " in readme_shows.grid_table(rows)


def test_the_long_tail_has_equal_lengths_under_every_plan(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(longtail, "LONGEST", 40)
    rows = longtail.longtail(
        adapter,
        count=10,
        batch=4,
        repeats=1,
        real=TINY_POLICY_DIR,
        real_count=4,
        real_repeats=1,
        folder=tmp_path,
    )
    assert [(row["policy"], row["prompts"], row["plan"]) for row in rows] == [
        (policy, kind, name)
        for policy, plans in (("tiny", longtail.PLANS), ("SmolLM2-135M", longtail.REAL_PLANS))
        for kind in (longtail.GROUPED, longtail.UNLIKE)
        for name in (*plans, turns.AGAIN)
    ]
    assert len({(row["policy"], row["num_tokens"]) for row in rows}) == 2
    assert all(row["length_longest"] <= 40 and row["time_over_plain"] > 0 for row in rows)
    json.dumps(rows)
    assert f"| SmolLM2-135M | {longtail.UNLIKE} | auto | " in readme_shows.longtail_table(rows)


def test_grouped_rollouts_have_a_row_for_each_epoch_and_for_both(tmp_path, monkeypatch):
    monkeypatch.setattr(GIVEN, "gsm8k", tmp_path / "gsm8k.jsonl")
    GIVEN.gsm8k.write_text('{"question": "1 and 1?"}\n' * 2)
    rows = grouped.grouped(
        TINY_POLICY_DIR,
        batches=(1,),
        temperatures=(1.0,),
        repeats=1,
        dtype="float32",
        folder=tmp_path,
        siblings=2,
        max_tokens=8,
    )
    assert [(row["prompts"], row["plan"], row["epoch"]) for row in rows] == [
        (kind, plan, epoch)
        for kind in (grouped.ARITHMETIC, grouped.GSM8K)
        for plan in ("plain", "auto", turns.AGAIN)
        for epoch in (1, 2, "both")
    ]
    for first, second, both in zip(rows[0::3], rows[1::3], rows[2::3], strict=True):
        assert both["num_tokens"] == first["num_tokens"] + second["num_tokens"]
        assert (first["rollouts"], both["rollouts"]) == (2, 4)
    json.dumps(rows)
    assert "| gsm8k | 1 | 1 | " in readme_shows.grouped_table(rows)


def test_lengths_have_a_heavy_tail():
    drawn = [length for seed in range(5) for length in longtail.lengths(200, seed=seed)]
    assert sorted(drawn)[len(drawn) // 2] in range(15, 20)
    assert 40 < sum(drawn) / len(drawn) < 54
    assert (min(drawn), max(drawn)) == (longtail.SHORTEST, longtail.LONGEST)


def test_each_repeat_begins_with_another_subject(policy):
    begun = []

    class Noting(turns.EngineSubject):
        def decode(self, requests):
            begun.append(self.name)
            return super().decode(requests)

    sampling = Sampling(max_tokens=2)
    repeats = [[*groups(prompts(policy, 1), sampling, index, siblings=1)] for index in range(2)]
    both = {
        name: Noting(policy, turns.read_plan(name, policy), law=turns.Law(), batch=1, max_length=64)
        for name in ("plain", "two_forward(8)")
    }
    waves = turns.waves_in_turn(both, repeats)
    assert begun == ["plain", "two_forward(8)", "two_forward(8)", "plain"]
    row = turns.figures(waves["two_forward(8)"], waves["plain"])
    assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
    assert row["repeats"] == 2
