"""The rows of a sweep as a table for the terminal."""

from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table

from blockroll.bench.frontier import IN_WORDS, SweepRow

Cell = Callable[[SweepRow], str]
TEXTS = ("plan", "finding")


def sweep_table(rows: Sequence[SweepRow], *, title: str) -> Table:
    """One line per point, the marked ones behind a `>`; what no point varies is left out."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False
    )
    columns = _columns(rows)
    for name in columns:
        table.add_column(name, justify="left" if name in TEXTS else "right", no_wrap=True)
    for row in rows:
        cells = [cell(row) for cell in columns.values()]
        table.add_row(*cells, style="bold" if row.is_marked else None)
    table.caption, table.caption_justify = "\n".join(_caption(rows[0])), "left"
    return table


def _columns(rows: Sequence[SweepRow]) -> dict[str, Cell]:
    """Headings and what stands below them, from left to right."""
    settings: dict[str, Cell] = {
        "temp": lambda row: f"{row.temperature:g}",
        "draft temp": lambda row: _figure(row.draft_temperature, "g"),
        "weight": lambda row: f"{row.mix_weight:g}",
    }
    varied = {name: cell for name, cell in settings.items() if len({cell(row) for row in rows}) > 1}
    return {
        "": lambda row: ">" if row.is_marked else "",
        "plan": lambda row: row.plan,
        **varied,
        "reward": lambda row: f"{row.reward:.3f}",
        "band": lambda row: f"{row.reward_cs_low:.3f}..{row.reward_cs_high:.3f}",
        "to plain": lambda row: _figure(row.difference, "+.3f"),
        "its band": _difference_band,
        "accept": lambda row: _figure(row.acceptance_rate, ".3f"),
        "tok/fwd": lambda row: _figure(row.tokens_per_forward, ".2f"),
        "x plain": lambda row: f"{row.speedup_over_plain:.2f}",
        "min..max": lambda row: f"{row.speedup_min:.2f}..{row.speedup_max:.2f}",
        "finding": lambda row: IN_WORDS[row.finding],
    }


def _caption(row: SweepRow) -> list[str]:
    lines = [
        f"{row.num_prompts} prompts, {row.samples} rollouts of each under every point, at batch {row.batch}, "
        f"{row.setting.threads} torch threads; speeds are medians over these repeats",
        f"rewards of task {row.task}, {row.reward_low:g} to {row.reward_high:g}; bands of a reward hold each "
        f"with probability {1 - row.alpha:g}, those of differences to plain all together",
        f"a loss is one of more than {row.max_loss:g} of that range; > is the fastest without",
    ]
    if row.num_failed:
        lines.append(f"{row.num_failed} rollouts of plain have no reward: they count as {row.reward_low:g}")
    return lines


def _difference_band(row: SweepRow) -> str:
    if row.difference_cs_low is None or row.difference_cs_high is None:
        return "-"
    return f"{row.difference_cs_low:+.3f}..{row.difference_cs_high:+.3f}"


def _figure(value: float | None, digits: str) -> str:
    return "-" if value is None else f"{value:{digits}}"
