"""The figures of a report, as SVG that takes its text and grid colours from the page it stands in.

Series are sequences of (x, y); points without a value are left out before they come here.
"""

import io
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Series = Sequence[tuple[float, float]]

# Stand-ins that no figure uses otherwise; the SVG gets the page's own colours in their place.
INK, GRID = "#010203", "#040506"
PAGE_COLOURS = {INK: "currentColor", GRID: "var(--grid)"}

BLUE, AMBER, TEAL, SLATE = "#3d7fd6", "#d9822b", "#2a9d8f", "#8c96a8"
STEPS = LinearSegmentedColormap.from_list("steps", ["#9cc3f0", "#3d7fd6", "#6a3fb5"])
STYLE: Any = {
    "font.size": 10,
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
        figure = Figure(figsize=(5.6, 3.1), layout="constrained")
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
        axes.plot(steps, smooth, color=BLUE, linewidth=2, label="training prompts (mean of 5 steps)")
        if evaluation:
            axes.plot(
                *_columns(evaluation), color=AMBER, linewidth=2, marker="o", markersize=5, label="held out"
            )
        axes.set(xlabel="step", ylabel="mean reward")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="lower right", fontsize=9)

    return plot


def over_steps(
    series: Series, label: str, *, colour: str = TEAL, low: float | None = None, high: float | None = None
) -> Callable[[Axes], None]:
    """One quantity per step."""

    def plot(axes: Axes) -> None:
        axes.plot(*_columns(series), color=colour, linewidth=2, marker="o", markersize=3)
        axes.set(xlabel="step", ylabel=label)
        axes.set_ylim(low, high)
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
        axes.legend(loc="upper left", fontsize=9)

    return plot


def _columns(series: Series) -> tuple[list[float], list[float]]:
    return [x for x, _ in series], [y for _, y in series]
