"""Short forms of the experiments on the guard."""

import functools
import math

import numpy as np
import pytest

from benchmarks import watch, watch_acceptance, watch_runs
from blockroll.rl_loops.watch.e_process import EProcess
from blockroll.rollout.calibration.bets import Bets


def test_null_runs_count_each_test_once_a_run():
    (row,) = watch.false_alarms(runs=200, steps=60)
    assert row["num_runs"] == 200
    assert {"reward", "learner", "acceptance", "calibration/ratio", "any"} <= row["spoke"].keys()
    most = 200 * watch.ALPHA + 4 * math.sqrt(200 * watch.ALPHA)
    assert all(count <= most for name, count in row["spoke"].items() if name != "any")


def test_null_steps_beyond_a_claim_are_told(monkeypatch):
    monkeypatch.setattr(watch, "null_bets", functools.partial(watch.null_bets, beyond=0.1))
    (row,) = watch.false_alarms(runs=20, steps=400)
    assert {name for name, count in row["spoke"].items() if count < 18} == set()


@pytest.mark.parametrize("name", ["calibration/tail", "calibration/ratio", "learner", "reward"])
def test_all_runs_at_once_are_the_runs_of_the_guard(name):
    test = watch.Watch(watch._EVERY_TEST).guard.tests[name]
    at_once = watch.null_runs(test, 30, 50, seed=1)
    generator = np.random.default_rng([1, *name.encode()])
    guards = [EProcess(test.sides) for _ in range(30)]
    for _ in range(50):
        for guard, wealth in zip(guards, watch.null_bets(name, 30, generator), strict=True):
            guard.add(Bets(8, wealth, 0.0))
    assert [guard.log_e_max >= -math.log(test.alpha) for guard in guards] == at_once.tolist()


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


@pytest.mark.filterwarnings(
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"  # what TRL itself calls
)
def test_acceptance_under_rl_is_measured_by_law_and_alignment(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(watch_acceptance, "RUNS", tmp_path)
    rows = watch_acceptance.acceptance(adapter, seeds=(0,), steps=2, batch=8, folder=tmp_path)
    assert [row["arm"] for row in rows] == [*watch_acceptance.ARMS]
    assert all(len(row["kl"]) == 2 and None not in row["rollout/acceptance_rate"] for row in rows)


def test_what_looking_costs_is_measured_in_pairs():
    rows = watch_runs.cost(batch=4, repeats=3, max_tokens=16)
    assert len(rows) == 3
    assert all(row["range"][0] > 0 for row in rows)
    *decoding, tests = rows
    assert [row["plan"] for row in decoding] == ["plain", "two_forward(8)"]
    assert all(row["range"][0] <= row["over_unwatched"] <= row["range"][1] for row in decoding)
    assert tests["range"][0] <= tests["over_drawing"] <= tests["range"][1]
