"""Experiments of many cells keep each as soon as it is measured."""

import time

import pytest

from benchmarks import cells, rows


@pytest.fixture(autouse=True)
def committed(monkeypatch):
    """As where the package has no changes that are not committed."""
    here = rows.provenance() | {"package_commit": "abc"}
    monkeypatch.setattr(cells, "provenance", lambda: here)


def stopped():
    raise KeyboardInterrupt


def test_an_experiment_that_was_stopped_goes_on_behind_its_last_whole_cell(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        cells.measured("x", {"a, 1": lambda: [{"value": 1}], "b": stopped}, folder=tmp_path)
    found = cells.measured("x", {"a, 1": stopped, "b": lambda: [{"value": 2}]}, folder=tmp_path)
    assert [(row["cell"], row["value"]) for row in found] == [("a, 1", 1), ("b", 2)]
    assert {row["package_commit"] for row in found} == {"abc"}


@pytest.mark.parametrize("commit", ["def", "abc+changes"])
def test_a_cell_of_another_package_is_measured_again(tmp_path, monkeypatch, commit):
    for value in (1, 2):
        found = cells.measured("x", {"a": lambda value=value: [{"value": value}]}, folder=tmp_path)
        assert found[0]["value"] == value
        here = rows.provenance() | {"package_commit": commit}
        monkeypatch.setattr(cells, "provenance", lambda here=here: here)


def test_what_there_is_no_time_for_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    cells.measured("x", {"a": lambda: [{}]}, folder=tmp_path)
    monkeypatch.setattr(cells.GIVEN, "deadline", time.monotonic())
    assert [row["cell"] for row in cells.measured("x", {"a": stopped, "b": stopped}, folder=tmp_path)] == [
        "a"
    ]
    assert "x: b is left out: no time is left" in capsys.readouterr().out


def test_rows_that_bear_their_provenance_keep_it(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    rows.write("x", [{"package_commit": "abc", "value": 1}, {"value": 2}])
    first, second = rows.read("x")
    assert first == {"package_commit": "abc", "value": 1}
    assert {"commit", "package_commit", "machine"} <= second.keys()
