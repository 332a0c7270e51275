"""Metrics on disk: whole lines, no NaN, cut back when a run resumes."""

import json
import math
import sys
import time

import pytest

from blockroll.errors import InvalidInput, MissingDependency
from blockroll.rl_loops.tracking import JsonLines, Wandb, read_lines, require_wandb, truncate_lines
from tests.watch_rows import guarded_rows


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    log.log({"step": 1, "reward": 0.5, "plan": "plain"})
    assert [json.loads(line) for line in path.read_text().split("\n") if line] == [
        {"step": 1, "reward": 0.5, "plan": "plain"}
    ]
    log.close()


def test_values_that_are_not_finite_are_written_as_null(tmp_path):
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.log({"step": 1, "a": math.nan, "b": math.inf, "c": [1.0, -math.inf], "d": {"e": math.nan}})
    log.close()
    assert read_lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "a": None, "b": None, "c": [1.0, None], "d": {"e": None}}
    ]


def test_a_log_goes_on_after_the_lines_that_are_there(tmp_path):
    for step in (1, 2):
        log = JsonLines(tmp_path / "metrics.jsonl")
        log.log({"step": step})
        log.close()
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_resuming_cuts_back_to_the_step_and_drops_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "rew')
    assert [row["step"] for row in read_lines(path)] == [1, 2, 3]
    truncate_lines(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r\n"])
def test_a_line_ends_at_a_newline_alone(tmp_path, separator):
    path = tmp_path / "metrics.jsonl"
    ending = "\r\n" if separator == "\r\n" else "\n"
    text = "ab" if separator == "\r\n" else f"a{separator}b"
    path.write_bytes(
        "".join(
            json.dumps({"step": step, "text": text}, ensure_ascii=ord(text[1]) < 32) + ending
            for step in (1, 2)
        ).encode()
    )
    assert read_lines(path) == [{"step": 1, "text": text}, {"step": 2, "text": text}]
    truncate_lines(path, 1)
    assert read_lines(path) == [{"step": 1, "text": text}]


def test_a_line_cut_short_is_named_left_out_and_gone_once_the_log_goes_on(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes('{"step": 1}\n{"step": 2, "text": "é'.encode()[:-1])
    assert read_lines(path) == [{"step": 1}]
    assert f"{path} ends in a line that was cut short" in caplog.text
    log = JsonLines(path)
    log.log({"step": 2})
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(InvalidInput, match=r"line 2 of .*metrics\.jsonl is not JSON"):
        read_lines(path)


def test_a_file_that_is_not_there_has_no_lines(tmp_path):
    assert read_lines(tmp_path / "metrics.jsonl") == []


def test_asking_for_wandb_without_having_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes the import fail, as if it were not installed
    with pytest.raises(MissingDependency, match=r"blockroll\[wandb\]"):
        require_wandb()


def test_what_the_guard_logs_reaches_one_run_of_wandb_whoever_goes_on_with_it(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows = guarded_rows(4, 4)
    for number, some in enumerate((rows[:2], rows[2:])):
        tracker = Wandb(name="watched", run_dir=tmp_path, config={"seed": number})
        for row in some:
            tracker.log({**row, "guard/said": f"words of step {row['step']}"})
        tracker.close()
    (run_id,) = (tmp_path / "wandb_run_id").read_text().split()
    # Its own process writes the files, a little after `close`.
    expected, deadline = [[1, 2], [3, 4]], time.monotonic() + 60
    while (found := steps_said(tmp_path, run_id)) != expected and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found == expected


def steps_said(run_dir, run_id):
    """By file of a run of wandb, the steps whose words of the guard are in it."""
    files = (run_dir / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")
    assert len({path.name for path in (run_dir / "wandb").glob("offline-run-*/*.wandb")}) == 1
    logged = [path.read_bytes() for path in files]
    return sorted(
        [step for step in range(1, 5) if f"words of step {step}".encode() in each] for each in logged
    )
