"""A run in a terminal while it goes on: one frame that is drawn anew as rows of metrics.jsonl are added."""

import contextlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from blockroll.errors import InvalidInput
from blockroll.rl_loops.display import number
from blockroll.rl_loops.run_lock import is_in_use
from blockroll.rl_loops.watch.rows import (
    AS_ASKED,
    Rows,
    evaluations,
    evidence_of,
    is_guarded,
    series,
    stretches,
)
from blockroll.rl_loops.watch.story import duration, last_words, story

POLL_S = 0.5
LEVELS = "▁▂▃▄▅▆▇█"
WIDEST = 100  # columns of a frame; wider terminals leave the rest empty
MOST_TESTS = 5  # that are shown: those that spoke, and the nearest to their thresholds
ROOMY = 72  # columns from which on tests have bars and counts
RECENT = 10  # steps whose mean time tells how long the rest takes
CURVES = (  # what it is called, its metric, digits
    ("reward", "reward", 3),
    ("acceptance", "rollout/acceptance_rate", 3),
    ("tokens per forward", "rollout/tokens_per_forward", 2),
    ("tokens per second", "rollout/generated_tok_s", 0),
)


def watch(run_dir: Path, console: Console, *, is_once: bool = False) -> None:
    """Show the run until no process works in its folder any more, or Ctrl-C; or one frame.

    Where the console is no terminal, the last frame alone is printed. InvalidInput if there is no run.
    """
    frames = _frames(run_dir, console)
    if is_once:
        console.print(next(frames))
    elif console.is_terminal:
        with Live(console=console, auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
            for each in frames:
                live.update(each, refresh=True)
    else:
        *_, last = frames
        console.print(last)


def _frames(run_dir: Path, console: Console) -> Iterator[RenderableType]:
    """One at once, and one for each change until the run has ended."""
    tail, shown = Tail(run_dir / "metrics.jsonl"), None
    while True:
        # Asked before rows are read: a run that has ended by then has written them all.
        is_running = is_in_use(run_dir)
        rows = tail.read()
        if (is_running, len(rows)) != shown:
            shown = (is_running, len(rows))
            yield _frame_of(run_dir, rows, is_running, console)
        if not is_running:
            return
        time.sleep(POLL_S)


class Tail:
    """Rows of a growing metrics.jsonl. One that a resume has cut back is another file, and read anew."""

    def __init__(self, path: Path) -> None:
        self._path, self._rows = path, list[dict[str, Any]]()
        self._file_id, self._offset = -1, 0

    def read(self) -> list[dict[str, Any]]:
        """All rows that are whole by now; InvalidInput names a line that is not JSON."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._file_id or status.st_size < self._offset:
                self._file_id, self._offset, self._rows = status.st_ino, 0, []
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        for line in filter(None, whole.split(b"\n")):
            try:
                self._rows.append(json.loads(line))
            except ValueError:
                raise InvalidInput(f"{self._path} has a line that is not JSON: {line[:60]!r}") from None
        self._offset += len(whole) + len(newline)
        return self._rows


def _frame_of(run_dir: Path, rows: Rows, is_running: bool, console: Console) -> RenderableType:
    asked_steps = yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["steps"]
    name, width = run_dir.resolve().name, min(console.width, WIDEST)
    return frame(rows, name=name, asked_steps=asked_steps, is_running=is_running, width=width)


def frame(rows: Rows, *, name: str, asked_steps: int, is_running: bool, width: int) -> RenderableType:
    """All that is shown, `width` columns wide."""
    parts: list[RenderableType] = [_progress(rows, asked_steps, is_running)]
    if rows:
        parts.append(_curves(rows, width))
        parts += [
            Text(each.text, style="red") for each in story(rows) if each.topic == "Losses" and each.is_alarm
        ]
        parts += _guard(rows, width)
    title = Text(f"{name} · {'running' if is_running else 'ended'}", style="bold")
    return Panel(Group(*parts), title=title, title_align="left", width=width)


def sparkline(values: Sequence[float], width: int) -> str:
    """Values between the lowest and the highest block; of more than `width`, means over neighbours."""
    count = min(len(values), width)
    edges = [i * len(values) // count for i in range(count + 1)] if count else []
    means = [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    if low == high:
        return LEVELS[len(LEVELS) // 2] * len(means)
    return "".join(LEVELS[round((value - low) / (high - low) * (len(LEVELS) - 1))] for value in means)


def _progress(rows: Rows, asked_steps: int, is_running: bool) -> RenderableType:
    done = int(rows[-1]["step"]) if rows else 0
    words = f"step {done} of {asked_steps}" if rows else "no step is finished yet"
    times = [seconds for _, seconds in series(rows, "step_time")][-RECENT:]
    if times:
        a_step = statistics.fmean(times)
        words += f" · {duration(a_step)} a step"
        if is_running and done < asked_steps:
            words += f" · about {duration(a_step * (asked_steps - done))} left"
    bar = Table.grid(expand=True)
    bar.add_row(ProgressBar(total=asked_steps, completed=done))
    return Group(Text(words), bar)


def _curves(rows: Rows, width: int) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right")
    table.add_column(style="cyan", no_wrap=True)
    for label, metric, digits in CURVES:
        values = [value for _, value in series(rows, metric)]
        table.add_row(label, number(rows[-1].get(metric), digits), sparkline(values, max(8, width - 40)))
    if held_out := [value for _, value in evaluations(rows)]:
        table.add_row("reward, held out", number(held_out[-1]), sparkline(held_out, max(8, width - 40)))
    difference = [series(rows, f"drift/reward/{each}") for each in ("mean", "cs_low", "cs_high")]
    if all(difference):
        mean, low, high = (each[-1][1] for each in difference)
        table.add_row("reward - lossless", f"{mean:+z.3f}", Text(f"{low:+z.3f} to {high:+z.3f}"))
    return table


def _guard(rows: Rows, width: int) -> list[RenderableType]:
    if not is_guarded(rows):
        return [Text("no guard", style="dim")]
    table = Table.grid(padding=(0, 2, 0, 0))
    for style in ("dim", "", "", "dim"):
        table.add_column(style=style, no_wrap=True)
    tests = evidence_of(rows)
    for test in tests[:MOST_TESTS]:
        has_spoken = test.spoke_at is not None
        bar = ProgressBar(
            total=1.0,
            completed=min(1.0, max(0.0, test.nearness)),
            width=max(8, width - 62),
            complete_style="red" if has_spoken else "green",
            finished_style="red",
        )
        log_e = Text(f"log e {number(test.highest, 1)} of {number(test.threshold, 1)}")
        log_e.stylize("red" if has_spoken else "")
        cells = (test.name, bar, log_e, f"n {test.num_values}")
        table.add_row(*(cells if width >= ROOMY else (test.name, log_e)))
    parts: list[RenderableType] = [Text("\nguard", style="bold")]
    if (mode := rows[-1].get("guard/mode") or AS_ASKED) != AS_ASKED:
        parts.append(
            Text(f"rollouts are drawn {mode} since step {stretches(rows)[-1].first}", style="yellow")
        )
    if spoken := last_words(rows):
        parts.append(Text(f"after step {spoken[0]} it said: {spoken[1]}", style="yellow"))
    further = len(tests) - MOST_TESTS
    rest = [Text(f"and {further} tests further from their thresholds", style="dim")] if further > 0 else []
    return [*parts, table, *rest]
