"""The figures of what the guard watches; each is a plot that `rl_loops.figures.draw` makes SVG of."""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from blockroll.bench.frontier import SweepRow
from blockroll.rl_loops.figures import BLUE, INK, SLATE, Series, save
from blockroll.rl_loops.watch.rows import Rows, Stretch, series

POSITION = re.compile(r"rollout/spec_accept_rate_pos_(\d+)")
MOST_COLUMNS = 60  # of a heat map: of longer runs, means over neighbouring steps
APART = 0.12  # of an axis, between what is written beside points
LOWEST, HIGHEST = -2.0, 3.0  # of evidence, in thresholds: curves beyond leave the figure
# As many as the guard has tests; each is seen on white and on dark paper.
COLOURS = (
    "#3d7fd6",
    "#d9822b",
    "#2a9d8f",
    "#c9566b",
    "#8f6fd0",
    "#84952b",
    "#d46a9f",
    "#3aa3c4",
    "#a8784d",
    "#8c96a8",
    "#6a7fd8",
    "#5f9e4a",
)


def evidence(curves: Mapping[str, Series], spoke: Sequence[float]) -> Callable[[Axes], None]:
    """By test, log e as a share of its threshold over steps, and the steps after which the guard spoke."""

    def plot(axes: Axes) -> None:
        for step in spoke:
            axes.axvline(step, color=INK, linewidth=0.8, linestyle=":", alpha=0.6)
        for (_, curve), colour in zip(curves.items(), _colours(len(curves)), strict=True):
            _line(axes, curve, color=colour, linewidth=1.8)
        axes.axhline(1.0, color=INK, linewidth=1.2, linestyle="--")
        values = [value for curve in curves.values() for _, value in curve]
        low, high = max(LOWEST, min(0.0, *values)), min(HIGHEST, max(1.0, *values))
        axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
        axes.set(xlabel="step", ylabel="log e / threshold")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))

    return plot


def acceptance_by_position(rows: Rows) -> Callable[[Axes], None] | None:
    """A heat map, draft positions over steps; None if no row has acceptance by position."""
    found = {int(match[1]): key for row in rows for key in row if (match := POSITION.fullmatch(key))}
    by_position = {position: dict(series(rows, found[position])) for position in sorted(found)}
    steps = sorted({step for values in by_position.values() for step in values})
    if not steps:
        return None
    columns = [list(part) for part in np.array_split(steps, min(len(steps), MOST_COLUMNS))]
    shares = [
        [_mean([values[step] for step in column if step in values]) for column in columns]
        for values in by_position.values()
    ]
    edges = [column[0] - 0.5 for column in columns] + [columns[-1][-1] + 0.5]

    def plot(axes: Axes) -> None:
        heat = axes.pcolormesh(
            edges,
            np.arange(len(by_position) + 1) + 0.5,
            np.ma.masked_invalid(np.array(shares, dtype=float)),
            cmap="viridis",
            vmin=0,
            vmax=1,
            edgecolors="face",  # else seams show between the cells
            linewidth=0.4,
        )
        axes.grid(visible=False)
        axes.set(xlabel="step", ylabel="draft position")
        axes.set_yticks(range(1, len(by_position) + 1), [str(each) for each in by_position])
        if len(by_position) > 10:
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        figure = axes.get_figure()
        assert figure is not None
        bar = figure.colorbar(heat, ax=axes, label="share accepted", pad=0.03, ticks=(0, 0.5, 1))
        bar.outline.set_visible(False)

    return plot


def reward_difference(mean: Series, low: Series, high: Series) -> Callable[[Axes], None]:
    """Mean difference over steps, in the band of its confidence sequence; all three at the same steps."""

    def plot(axes: Axes) -> None:
        steps = [step for step, _ in mean]
        axes.fill_between(
            steps,
            [value for _, value in low],
            [value for _, value in high],
            color=BLUE,
            alpha=0.2,
            linewidth=0,
        )
        for edge in (low, high):
            _line(axes, edge, color=BLUE, linewidth=0.8)
        _line(axes, mean, color=BLUE, linewidth=2)
        axes.axhline(0.0, color=INK, linewidth=1, linestyle="--")
        axes.set(xlabel="step", ylabel="reward difference")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))

    return plot


def frontier(rows: Sequence[SweepRow], x: Literal["acceptance", "speed"]) -> Callable[[Axes], None]:
    """Reward of a sweep's points against acceptance or speed over plain, lines through those of one kind.

    Bars are the bands of differences, drawn from plain's reward, and the range of speeds. Dashed: plain, and
    below it, dotted, what may be lost. A ring is around marked points. Beside a point stands its mix weight,
    unless it would stand over another.
    """
    lines = sweep_lines(rows)
    labels: list[tuple[float, float, str]] = []

    def plot(axes: Axes) -> None:
        for plain in (row for row in rows if row.difference is None):
            axes.axhline(
                plain.reward, color=SLATE, linewidth=1.2, linestyle="--", label=_plain_label(plain, rows)
            )
            axes.axhline(plain.reward - plain.max_loss * plain.range, color=SLATE, linewidth=1, linestyle=":")
        for number, (label, line) in enumerate(lines.items()):
            drawn = [row for row in line if x == "speed" or row.acceptance_rate is not None]
            if not drawn:
                continue
            places = [_place(row, x) for row in drawn]
            axes.errorbar(
                places,
                [row.reward for row in drawn],
                yerr=np.array([_reach(row) for row in drawn]).T,
                xerr=np.array([_spread(row) for row in drawn]).T if x == "speed" else None,
                color=colour_of(number),
                linewidth=1,
                elinewidth=1,
                alpha=0.85,
                marker="o",
                markersize=4,
                label=label,
            )
            for row, place in zip(drawn, places, strict=True):
                if row.is_marked:
                    axes.plot(place, row.reward, "o", markersize=11, markerfacecolor="none", color=INK)
                labels.append((place, row.reward, f"{row.mix_weight:g}"))
        axes.margins(x=0.14)
        _write_apart(axes, labels)
        axes.set(xlabel="acceptance rate" if x == "acceptance" else "speed over plain", ylabel="mean reward")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))

    return plot


def _write_apart(axes: Axes, labels: Sequence[tuple[float, float, str]]) -> None:
    """Texts beside their points, but for those that would stand over one that is there."""
    width, height = (high - low for low, high in (axes.get_xlim(), axes.get_ylim()))
    written: list[tuple[float, float]] = []
    for x, y, text in labels:
        if all(
            abs(x - other_x) > APART * width or abs(y - other_y) > APART * height
            for other_x, other_y in written
        ):
            axes.annotate(text, (x, y), (5, 4), textcoords="offset points", fontsize=9)
            written.append((x, y))


def sweep_lines(rows: Sequence[SweepRow]) -> dict[str, list[SweepRow]]:
    """Points that differ in their mix weight alone, by what they have in common; plain has none."""
    lines: dict[str, list[SweepRow]] = {}
    for row in rows:
        if row.difference is not None:
            parts = [row.plan, *_temperature(row, rows)]
            if row.draft_temperature is not None:
                parts.append(f"drafts T={row.draft_temperature:g}")
            lines.setdefault(", ".join(parts), []).append(row)
    return lines


def save_sweep(rows: Sequence[SweepRow], path: Path) -> None:
    """A picture of its own: reward against speed, and against acceptance."""
    save([frontier(rows, "speed"), frontier(rows, "acceptance")], path, height=4.2)


def _temperature(row: SweepRow, rows: Sequence[SweepRow]) -> list[str]:
    """Said where they differ in it."""
    return [f"T={row.temperature:g}"] if len({each.temperature for each in rows}) > 1 else []


def _plain_label(row: SweepRow, rows: Sequence[SweepRow]) -> str:
    return ", ".join([row.plan, *_temperature(row, rows)])


def _place(row: SweepRow, x: Literal["acceptance", "speed"]) -> float:
    if x == "speed":
        return row.speedup_over_plain
    assert row.acceptance_rate is not None
    return row.acceptance_rate


def _reach(row: SweepRow) -> tuple[float, float]:
    """How far the band of the difference goes below and above it."""
    assert row.difference is not None
    assert row.difference_cs_low is not None
    assert row.difference_cs_high is not None
    below, above = row.difference - row.difference_cs_low, row.difference_cs_high - row.difference
    return max(0.0, below), max(0.0, above)


def _spread(row: SweepRow) -> tuple[float, float]:
    return row.speedup_over_plain - row.speedup_min, row.speedup_max - row.speedup_over_plain


def shaded(plot: Callable[[Axes], None], stretches: Sequence[Stretch]) -> Callable[[Axes], None]:
    """The same plot over steps, with the steps under a fallback of the guard behind it."""

    def shade(axes: Axes) -> None:
        plot(axes)
        for stretch in stretches:
            axes.axvspan(
                stretch.first - 0.5, stretch.last + 0.5, color=SLATE, alpha=0.22, linewidth=0, zorder=0
            )

    return shade


def colour_of(test: int) -> str:
    """The colour of the test at this place of `evidence`."""
    return COLOURS[test % len(COLOURS)]


def _colours(count: int) -> list[str]:
    return [colour_of(i) for i in range(count)]


def _line(axes: Axes, curve: Series, **style: Any) -> None:
    """A single point is no line: it is marked."""
    steps, values = [step for step, _ in curve], [value for _, value in curve]
    axes.plot(steps, values, marker="o" if len(curve) == 1 else "", markersize=3, **style)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else float("nan")
