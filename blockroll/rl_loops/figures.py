"""The figures of a report and of a bench.

Those of a report are SVG that takes its text and grid colours from the page it stands in.

Series are sequences of (x, y); points without a value are left out before they come here.
"""

import io
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Series = Sequence[tuple[float, float]]
Lines = dict[str, list[Mapping[str, Any]]]  # rows of a bench, from the smallest batch up, by label

# Stand-ins that no figure uses otherwise; the SVG gets the page's own colours in their place.
INK, GRID = "#010203", "#040506"
PRINT_COLOURS = {INK: "#1f2937", GRID: "#d1d5db"}  # where there is no page: a file of its own
PAGE_COLOURS = {INK: "currentColor", GRID: "var(--grid)"}

BLUE, AMBER, TEAL, SLATE = "#3d7fd6", "#d9822b", "#2a9d8f", "#8c96a8"
STEPS = LinearSegmentedColormap.from_list("steps", ["#9cc3f0", "#3d7fd6", "#6a3fb5"])
STYLE: Any = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "svg.hashsalt": "blockroll",
}


def draw(plot: Callable[[Axes], None]) -> str:
    """The SVG text of one figure, ready to stand in a page."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.5, 2.8), layout="constrained")
        plot(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for stand_in, colour in PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return svg


def reward(train: Series, evaluation: Series) -> Callable[[Axes], None]:
    """Training reward, raw and as a running mean of five steps, and evaluations."""

    def plot(axes: Axes) -> None:
        steps, values = _columns(train)
        axes.plot(steps, values, color=BLUE, alpha=0.3, linewidth=1)
        smooth = [statistics.fmean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]
        axes.plot(steps, smooth, color=BLUE, linewidth=2, label="training (mean of 5)")
        if evaluation:
            axes.plot(
                *_columns(evaluation), color=AMBER, linewidth=2, marker="o", markersize=5, label="held out"
            )
        axes.set(xlabel="step", ylabel="mean reward")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend_above(axes)

    return plot


def over_steps(
    series: Series, label: str, *, colour: str = TEAL, low: float | None = None, high: float | None = None
) -> Callable[[Axes], None]:
    """One quantity per step."""

    def plot(axes: Axes) -> None:
        axes.plot(*_columns(series), color=colour, linewidth=2, marker="o", markersize=3)
        axes.set(xlabel="step", ylabel=label)
        axes.set_ylim(low, high if high is not None else 1.08 * max(value for _, value in series) or None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return plot


def reward_against_acceptance(points: Sequence[tuple[float, float, float]]) -> Callable[[Axes], None]:
    """Points of (acceptance, reward, step), joined by nothing: whether drafts decay as the policy learns."""

    def plot(axes: Axes) -> None:
        acceptance, rewards, steps = zip(*points, strict=True)
        dots = axes.scatter(acceptance, rewards, c=steps, cmap=STEPS, s=34, linewidths=0)
        axes.set(xlabel="acceptance rate", ylabel="mean reward")
        figure = axes.get_figure()
        assert figure is not None
        bar = figure.colorbar(dots, ax=axes, label="step", pad=0.02)
        bar.outline.set_visible(False)
        bar.locator = MaxNLocator(integer=True, nbins=5)
        bar.update_ticks()

    return plot


def speed(rows: Sequence[Mapping[str, Any]]) -> Callable[[Axes], None]:
    """Median tokens per second of each plan by batch, every repeat as a dot, and the ratio to plain."""

    def plot(axes: Axes) -> None:
        batches = sorted({row["batch"] for row in rows})
        plans = sorted({row["plan"] for row in rows}, key=lambda plan: (plan != "plain", plan))
        cells = {(row["plan"], row["batch"]): row for row in rows}
        width = 0.8 / len(plans)
        colours = [
            SLATE if plan == "plain" else (BLUE, TEAL, AMBER)[i % 3] for i, plan in enumerate(plans, -1)
        ]
        for number, (plan, colour) in enumerate(zip(plans, colours, strict=True)):
            places = [i + (number - (len(plans) - 1) / 2) * width for i in range(len(batches))]
            heights = [float(cells.get((plan, batch), {}).get("tokens_per_s", 0.0)) for batch in batches]
            axes.bar(places, heights, width * 0.92, color=colour, label=plan)
            for place, height, batch in zip(places, heights, batches, strict=True):
                row = cells.get((plan, batch), {})
                repeats = row.get("tokens_per_s_all") or []
                axes.plot([place] * len(repeats), repeats, ".", color=INK, alpha=0.45, markersize=4)
                plain = cells.get(("plain", batch))
                if plan != "plain" and plain and height:
                    ratio = f"{height / float(plain['tokens_per_s']):.2f}×"  # noqa: RUF001
                    top = max([height, *repeats])
                    axes.annotate(
                        ratio, (place, top), (0, 3), textcoords="offset points", ha="center", fontsize=9
                    )
        axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        axes.set(xlabel="requests decoded together", ylabel="tokens per second")
        axes.margins(y=0.15)
        axes.grid(axis="x", visible=False)
        legend_above(axes)

    return plot


def legend_above(axes: Axes) -> None:
    """A legend that covers no curve."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=2,
        fontsize=9,
        borderpad=0.2,
        handlelength=1.4,
        columnspacing=1.2,
    )


def save_bench(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rows of a bench as a picture of its own: speed-up over plain, and acceptance by draft position."""
    lines = _bench_lines([row for row in rows if not row["skipped"]])
    plots = [bench_speedup(lines)]
    if any(row["acceptance_by_position"] for row in rows):
        plots.append(bench_acceptance(lines))
    save(plots, path, height=3.8 + 0.08 * len(lines))


def save(plots: Sequence[Callable[[Axes], None]], path: Path, *, height: float) -> None:
    """Plots side by side on white, over the legend of the first."""
    style = {key: PRINT_COLOURS.get(value, value) for key, value in STYLE.items()}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.4 * len(plots), height), layout="constrained")
        for axes, plot in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
            plot(axes)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize=9)
        figure.savefig(path, dpi=150, facecolor="white")


def bench_speedup(lines: Lines) -> Callable[[Axes], None]:
    """Median ratio to plain by batch, with whiskers from the smallest to the largest repeat."""

    def plot(axes: Axes) -> None:
        batches = sorted({row["batch"] for line in lines.values() for row in line})
        axes.axhline(1.0, color=SLATE, linewidth=1.5, label="plain")
        for number, (label, line) in enumerate(lines.items()):
            compared = [row for row in line if row["speedup_over_plain"] is not None]
            if not compared:
                continue
            # Side by side, so that whiskers do not hide each other.
            shift = min(0.06, 0.5 / len(lines)) * (number - (len(lines) - 1) / 2)
            medians = [row["speedup_over_plain"] for row in compared]
            below = [row["speedup_over_plain"] - row["speedup_min"] for row in compared]
            above = [row["speedup_max"] - row["speedup_over_plain"] for row in compared]
            axes.errorbar(
                [batches.index(row["batch"]) + shift for row in compared],
                medians,
                yerr=[below, above],
                color=f"C{number}",
                linewidth=2,
                elinewidth=1.2,
                marker="o",
                markersize=5,
                capsize=3,
                label=label,
            )
        axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        axes.set(
            xlabel="requests decoded together",
            ylabel="speed over plain",
            title="median of the repeats, and their range",
        )
        axes.set_ylim(bottom=0)

    return plot


def bench_acceptance(lines: Lines) -> Callable[[Axes], None]:
    """Acceptance by draft position at the smallest batch: of drafts reached, and of all steps (dashed)."""

    def plot(axes: Axes) -> None:
        for number, (row, *_) in enumerate(lines.values()):
            for key, style in (("acceptance_by_position", "-"), ("accepted_at_least", "--")):
                shares = [(i, share) for i, share in enumerate(row[key] or (), start=1) if share is not None]
                if shares:
                    axes.plot(*_columns(shares), style, color=f"C{number}", marker="o", markersize=4)
        axes.set(
            xlabel="draft position",
            ylabel="share accepted",
            title="of the drafts reached; dashed: of all steps",
        )
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return plot


def _bench_lines(rows: Sequence[Mapping[str, Any]]) -> Lines:
    """Rows of one subject and setting, plain left out, by a label that names what differs between them."""
    words: dict[str, Callable[[Any], str]] = {
        "plan": str,
        "law": str,
        "temperature": "T={:g}".format,
        "prompt_tokens": "prompt {}".format,
        "max_tokens": "max {}".format,
    }
    drawn = sorted((row for row in rows if row["plan"] != "plain"), key=lambda row: row["batch"])
    varied = [key for key in words if key == "plan" or len({row[key] for row in drawn}) > 1]
    lines: Lines = {}
    for row in drawn:
        lines.setdefault(", ".join(words[key](row[key]) for key in varied), []).append(row)
    return lines


def _columns(series: Series) -> tuple[list[float], list[float]]:
    return [x for x, _ in series], [y for _, y in series]
