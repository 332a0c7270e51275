"""What a person sees while a run goes on and when it ends."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


class StepProgress:
    """A progress bar over steps with the latest reward, acceptance and speed; in a log a line per step."""

    def __init__(self, console: Console, *, name: str, done: int, total: int) -> None:
        self._console, self._name, self._total = console, name, total
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[live]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(name, total=total, completed=done, live="")

    def __enter__(self) -> "StepProgress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, metrics: Mapping[str, Any]) -> None:
        """Move on to `metrics["step"]`."""
        live = (
            f"reward {number(metrics['reward'])} · acceptance {number(metrics['rollout/acceptance_rate'])} · "
            f"{number(metrics['rollout/generated_tok_s'], 0)} tok/s"
        )
        self._progress.update(self._task, completed=metrics["step"], live=live)
        if not self._console.is_terminal:
            line = f"{self._name} {metrics['step']}/{self._total} {live}"
            self._console.print(line, soft_wrap=True, highlight=False, markup=False)


def summary_table(rows: Sequence[Mapping[str, Any]], *, name: str, report: Path) -> Table:
    """First and last step side by side, from the rows of `metrics.jsonl`."""
    table = Table(title=f"Run {name}: {len(rows)} steps", title_justify="left")
    for column, justify in (("", "left"), ("first", "right"), ("last", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    first, last = rows[0], rows[-1]
    evaluations = [row["eval/reward"] for row in rows if row.get("eval/reward") is not None]
    if evaluations:
        before = first.get("eval/initial_reward", evaluations[0])
        table.add_row("reward, held-out prompts", number(before), number(evaluations[-1]))
    for label, key, digits in (
        ("reward, training prompts", "reward", 3),
        ("acceptance rate", "rollout/acceptance_rate", 3),
        ("tokens per forward", "rollout/tokens_per_forward", 2),
        ("generated tokens per second", "rollout/generated_tok_s", 0),
        ("seconds per step", "step_time", 2),
        ("weight sync, seconds", "perf/weight_sync_s", 3),
        ("policy version served", "sync/version", 0),
        ("rollouts failed, in all", "rollout/failed_total", 0),
    ):
        table.add_row(label, number(first.get(key), digits), number(last.get(key), digits))
    table.caption = f"Report: {report}"
    table.caption_justify = "left"
    return table


def number(value: float | None, digits: int = 3) -> str:
    """A figure for people; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"  # noqa: RUF001
