"""The live view: what a terminal shows of a run that goes on or has ended, and that it ends by itself."""

import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading

import pytest
from rich.console import Console

from blockroll.errors import InvalidInput
from blockroll.rl_loops.run_lock import is_in_use, run_lock
from blockroll.rl_loops.tracking import read_lines, truncate_lines
from blockroll.rl_loops.watch.live import LEVELS, Tail, frame, sparkline, watch
from tests.command_line import blockroll
from tests.runs import config_for, run, save_policy
from tests.unit.test_report import run_folder
from tests.watch_rows import SAID, TESTS, guarded_rows, plain_row


def shown(rows, width=80, **others):
    options = {"name": "demo", "asked_steps": 60, "is_running": True, **others}
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(frame(rows, width=width, **options))
    return console.export_text()


def test_a_frame_shows_progress_curves_tests_and_the_guards_last_words():
    text = shown(guarded_rows(50, 40))
    assert "demo · running" in text
    assert "step 50 of 60 · 3.0 s a step · about 30 s left" in text
    for label in ("reward ", "acceptance", "tokens per forward", "tokens per second", "reward - lossless"):
        assert f"│ {label}" in text
    tests = text[text.index("│ guard ") :]
    nearest = ("ratio", "draft_set", "tail", "residual")
    assert {each for each in TESTS if f"│ {each} " in tests} == {
        "reward",
        *(f"calibration/{name}" for name in nearest),
    }
    assert "and 7 tests further from their thresholds" in text
    assert len(text.splitlines()) <= 24  # a usual terminal
    assert re.search(r"│ reward +━+ +log e 3\.2 of 3\.0 +n 1100", text)
    assert "rollouts are drawn lossless since step 41" in text
    assert SAID in re.sub(r"\s*│\n│ ", " ", text)
    assert any(level in text for level in LEVELS)


@pytest.mark.parametrize("width", [48, 80, 100])
@pytest.mark.parametrize("rows", [guarded_rows(50, 40), [plain_row(1)], []], ids=["guarded", "plain", "none"])
def test_every_frame_fits_its_terminal_and_cuts_no_word(rows, width):
    text = shown(rows, width)
    assert {len(line) for line in text.splitlines()} == {width}
    assert "…" not in text


def test_a_run_before_its_first_step_and_one_without_a_guard_say_so():
    assert "no step is finished yet" in shown([])
    text = shown([plain_row(1, **{"rollout/acceptance_rate": None, "rollout/failed_total": 2.0})])
    assert "no guard" in text
    assert "2 rollouts failed." in text
    assert re.search(r"acceptance +–", text)  # noqa: RUF001


def test_a_sparkline_rises_falls_and_is_never_wider_than_asked():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == LEVELS
    assert sparkline([1, 0], 8) == LEVELS[-1] + LEVELS[0]
    assert sparkline([0.5] * 3, 8) == LEVELS[4] * 3
    assert sparkline([0] * 50 + [1] * 50, 10) == LEVELS[0] * 5 + LEVELS[-1] * 5
    assert sparkline([], 8) == ""


def test_a_tail_reads_whole_lines_as_they_come_and_anew_after_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text('{"step": 1}\n{"st')
    assert tail.read() == [{"step": 1}]
    with path.open("a") as file:
        file.write('ep": 2}\n{"step": 3}\n')
    assert tail.read() == [{"step": 1}, {"step": 2}, {"step": 3}]
    truncate_lines(path, 1)
    with path.open("a") as file:
        file.write('{"step": 2, "again": true}\n')
    assert tail.read() == [{"step": 1}, {"step": 2, "again": True}]
    with path.open("a") as file:
        file.write("nope\n")
    with pytest.raises(InvalidInput, match="not JSON"):
        tail.read()


def test_a_folder_is_in_use_while_its_lock_is_held_and_not_after_its_holder_was_killed(tmp_path):
    assert not is_in_use(tmp_path)
    with run_lock(tmp_path):
        assert is_in_use(tmp_path)
    assert not is_in_use(tmp_path)
    (tmp_path / ".lock.holder").write_text("process 1 on elsewhere\n")  # what a kill leaves
    assert not is_in_use(tmp_path)


def test_a_real_run_is_shown_while_it_goes_on_and_the_view_ends_with_it(tmp_path):
    config = config_for(tmp_path, save_policy(tmp_path / "policy", 0), steps=3)
    drawn = threading.Event()

    class Seen(io.StringIO):
        def write(self, text):
            if "step " in text:
                drawn.set()
            return super().write(text)

    seen = Seen()
    console = Console(file=seen, force_terminal=True, width=80)
    view = threading.Thread(target=watch, args=(config.run_dir, console))

    def look(metrics):
        if metrics["step"] == 1:
            view.start()
            assert drawn.wait(60)

    run(config, callbacks=[look])
    view.join(60)
    assert not view.is_alive()
    text = seen.getvalue()
    assert text.index("step 1 of 3") < text.index("step 3 of 3")
    assert text.index("run · running") < text.index("run · ended")


@contextlib.contextmanager
def in_a_terminal(*arguments):
    """A command that runs in a terminal of its own: its process, and a function that reads until a text."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "blockroll", *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=theirs, stderr=theirs, env={**os.environ, "COLUMNS": "80", "LINES": "24"}
    )
    os.close(theirs)
    got = bytearray()

    def read_until(text):
        with contextlib.suppress(OSError):  # Linux has one where the other side is closed
            while text.encode() not in got:
                got.extend(os.read(ours, 1 << 16))
        return got.decode()

    try:
        yield process, read_until
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_ctrl_c_ends_the_view_of_a_running_run_and_leaves_the_terminal_as_it_was(tmp_path):
    folder = run_folder(tmp_path / "demo", guarded_rows(5, 3))
    with run_lock(folder), in_a_terminal("report", "--live", folder) as (process, read_until):
        assert "demo · running" in read_until("╰")
        process.send_signal(signal.SIGINT)
        assert read_until("never").endswith("\x1b[?25h")  # the cursor is shown again
        assert process.wait(60) == 0


def test_one_frame_of_a_running_run_is_printed_and_a_finished_one_ends_at_once(tmp_path):
    folder = run_folder(tmp_path / "demo", guarded_rows(5, 3))
    with run_lock(folder):
        result = blockroll("report", "--live", "--once", folder)
    assert (result.exit_code, result.stdout.count("demo · running")) == (0, 1)
    result = blockroll("report", "--live", folder)
    assert (result.exit_code, result.stdout.count("demo · ended")) == (0, 1)
    assert not (folder / "report.html").exists()
    assert len(read_lines(folder / "metrics.jsonl")) == 5


def test_the_dashboard_is_written_for_no_run_in_particular(tmp_path):
    result = blockroll("report", "--grafana", tmp_path / "board.json")
    assert result.exit_code == 0
    assert json.loads((tmp_path / "board.json").read_text())["uid"] == "blockroll"
