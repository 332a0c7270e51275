"""Short forms of the experiments on the guard."""

import functools
import math

import pytest

from benchmarks import watch, watch_runs


def test_null_runs_count_each_test_once_a_run(tmp_path):
    rows = watch.false_alarms(cells=1, runs=4, steps=40, folder=tmp_path)
    (row,) = rows
    assert row["num_runs"] == 4
    assert {"reward", "learner", "acceptance", "calibration/ratio", "any"} <= row["spoke"].keys()
    assert all(count <= 4 for count in row["spoke"].values())
    assert row["spoke"]["any"] <= 3


def test_a_null_step_that_breaks_a_claim_is_told(monkeypatch):
    monkeypatch.setattr(watch, "null_step", functools.partial(watch.null_step, beyond=0.2))
    (row,) = watch.null_runs(range(3), 60)
    assert row["spoke"]["any"] == 3


def test_every_fault_is_told_by_the_test_that_must_see_it(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "RUNS", tmp_path)
    rows = watch.power(adapter, seeds=(0,), folder=tmp_path)
    assert {row["fault"] for row in rows} == {*watch.PLANTED, watch.STALE, watch.HARM}
    assert all(math.isfinite(row["drawn"]) and row["values"] > 0 for row in rows)


def test_an_engine_without_a_fault_is_not_told_of_one(adapter, monkeypatch):
    sound = watch.Planted(fault=lambda plant: None, test="draft_set")
    monkeypatch.setattr(watch, "range", lambda _: range(2), raising=False)
    (row,) = watch.delays(adapter, "none", sound, (0,))
    assert row["drawn"] == math.inf


def test_runs_are_silent_and_harm_is_found(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(watch_runs, "RUNS", tmp_path)
    (row,) = watch_runs.silent(seeds=(0,), steps=2, prompts_per_step=2)
    assert row["said"] == []
    assert row["drift/calibration/surprisal/n"] > 0
    rows = watch_runs.harm(adapter, seeds=(0,), steps=2, prompts_per_step=2, eval_prompts=4)
    assert {row["arm"] for row in rows} == {*watch_runs.HARM_ARMS}
    guarded = [row for row in rows if row["arm"] == "mixed, guarded"]
    assert all("shadow/num_rollouts" in row for row in guarded)


def test_what_looking_costs_is_measured_in_pairs(adapter):
    rows = watch_runs.cost(adapter, batch=4, repeats=3, max_tokens=16)
    assert len(rows) == 4
    assert all(row["range"][0] > 0 for row in rows)
    assert rows[0]["over_unwatched"] == pytest.approx(rows[0]["over_unwatched"])
