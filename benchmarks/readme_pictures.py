"""Pictures of the README and docs/measured.md, drawn from committed rows."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks.readme_learning import laws_summary, rewards_by_run, smoothed
from benchmarks.readme_peers import PROMPTS, best_of_vllm, cells_of, has_grouped, of_workload
from benchmarks.readme_watch import arms, by_arm
from benchmarks.rows import ROOT, Row, has_rows, read

IMAGES = ROOT / "docs" / "images"
COLOURS = {"plain": "#6b7280", "two_forward": "#0f766e", "lossless": "#0f766e"}
COLOURS |= {"mixed, corrected": "#3d7fd6", "mixed, uncorrected": "#d9822b"}
COLOURS |= {"lossless, left alone": "#0f766e", "lossless, aligned": "#5eb5ad"}
COLOURS |= {"mixed, left alone": "#d9822b", "mixed, aligned": "#e8b98a"}
COLOURS |= {"mixed": "#d9822b", "mixed, guarded": "#3d7fd6"}
COLOURS |= {"left alone": "#6b7280", "aligned": "#0f766e"}
BARS = {  # of speeds: what is drawn, its name and its colour
    "plain": ("ours, plain", "#6b7280"),
    "auto": ("ours, auto", "#0f766e"),
    "transformers_generate": ("transformers' generate", "#d9822b"),
    "vllm": ("vLLM, plain", "#93b8e8"),
    "best": ("vLLM, best of its ways", "#2b62b8"),
}


def draw_all() -> None:
    """Those whose rows are there."""
    draw_learning()
    if has_rows("learning_laws"):
        draw_laws()
    if has_rows("trl_alignment"):
        draw_alignment()
    if has_rows("watch_harm"):
        draw_harm(read("watch_harm"))
    if has_rows("watch_acceptance"):
        draw_acceptance(read("watch_acceptance"))
    if has_rows("speed_peers") and has_grouped(read("speed_peers")):
        draw_peers(read("speed_peers"))


def draw_learning() -> None:
    """Reward over steps: the mean of the seeds and the band they span, per plan."""
    with _picture("learning_plans", width=8) as (axes,):
        for plan, seeds in sorted(rewards_by_run().items()):
            _band(axes, plan, [values for _, values in sorted(seeds.items())], label=plan.replace("_", "-"))
        axes.set(xlabel="step", ylabel="reward", title=f"GRPO, mean and band of {len(seeds)} seeds")
        axes.legend(frameon=False, loc="lower right", title="rollouts")


def draw_laws() -> None:
    """Reward and acceptance over steps, per law: how far they move together."""
    with _picture("learning_laws", width=10, panels=2) as (left, right):
        for variant, law in laws_summary().items():
            _band(left, variant, law.rewards)
            if all(law.acceptance):
                _band(right, variant, law.acceptance)
        left.set(xlabel="step", ylabel="reward of rollouts", title="reward")
        right.set(xlabel="step", ylabel="share of drafts accepted", title="acceptance")
        left.set_ylim(top=0.62)
        left.legend(
            frameon=False, loc="upper left", ncols=2, title=f"mean and band of {len(law.rewards)} seeds"
        )


def draw_alignment() -> None:
    """Acceptance and reward over updates, with drafts that follow the policy and drafts left alone."""
    rows = read("trl_alignment")
    with _picture("trl_alignment", width=10, panels=2) as (left, right):
        for is_aligned, kind in ((False, "left alone"), (True, "aligned")):
            runs = [row for row in rows if row["is_aligned"] == is_aligned]
            _band(left, kind, [row["rollout/acceptance_rate"] for row in runs])
            _band(right, kind, [row["reward"] for row in runs])
        left.set(xlabel="update", ylabel="share of drafts accepted", title="acceptance")
        right.set(xlabel="update", ylabel="reward of rollouts", title="reward")
        right.legend(frameon=False, loc="lower right", title=f"mean and band of {len(runs)} seeds")


def draw_harm(rows: Sequence[Row]) -> None:
    """Reward under a law that earns less, with and without the guard, and the evidence it acted on."""
    with _picture("watch_harm", width=10, panels=2) as (left, right):
        for arm, seeds in arms(rows).items():
            _band(left, arm, [[row["reward"] for row in run] for run in seeds.values()])
        for run in arms(rows)["mixed, guarded"].values():
            told = [row for row in run if row.get("drift/reward/log_e") is not None]
            right.plot(
                [row["step"] for row in told],
                [row["drift/reward/log_e"] for row in told],
                color=COLOURS["mixed, guarded"],
            )
            right.axhline(told[0]["drift/reward/threshold"], color="#6b7280", linestyle="--")
        left.set(xlabel="step", ylabel="reward of rollouts", title="reward")
        right.set(xlabel="step", ylabel="log e, nats", title="evidence of harm, by seed, and its line")
        left.legend(frameon=False, loc="lower right", title=f"mean and band of {len(seeds)} seeds")


def draw_acceptance(rows: Sequence[Row]) -> None:
    """Acceptance and reward over updates by law and alignment, and one against the other."""
    accepted, rewards = by_arm(rows, "rollout/acceptance_rate"), by_arm(rows, "reward")
    with _picture("watch_acceptance", width=14, panels=3) as (left, middle, right):
        for arm in accepted:
            _band(left, arm, accepted[arm])
            _band(middle, arm, rewards[arm])
            path = [
                np.mean([smoothed(curve) for curve in curves[arm]], axis=0) for curves in (accepted, rewards)
            ]
            right.plot(*path, color=COLOURS[arm], linewidth=2)
            right.plot(path[0][-1], path[1][-1], "o", color=COLOURS[arm])
        left.set(xlabel="update", ylabel="share of drafts accepted", title="acceptance")
        middle.set(xlabel="update", ylabel="reward of rollouts", title="reward")
        right.set(
            xlabel="share of drafts accepted", ylabel="reward of rollouts", title="the path, to its dot"
        )
        left.legend(frameon=False, title=f"mean and band of {len(accepted[arm])} seeds")


def draw_peers(rows: Sequence[Row]) -> None:
    """Tokens per second of a real model: where nothing can be looked up, and where prompts come back."""
    grouped = cells_of(of_workload(rows, "grouped"))
    even = cells_of(of_workload(rows, "even"))
    widths = [max(len(even), 1), max(len(grouped), 1)]
    with _picture("speed_peers", width=14, panels=2, widths=widths) as (left, right):
        _bars(left, {f"batch {batch}": cells for (_, _, batch), cells in even.items()})
        _bars(
            right,
            {
                f"{PROMPTS.get(prompts, prompts)}\nbatch {batch}, T = {temperature:g}": cells
                for (prompts, temperature, batch), cells in grouped.items()
            },
        )
        left.set(ylabel="tokens per second", title="every prompt new")
        siblings, epochs = ({row[name] for row in rows} - {None} for name in ("siblings", "epochs"))
        right.set_title(
            f"{', '.join(map(str, siblings))} rollouts of each prompt, {', '.join(map(str, epochs))} epochs"
        )
        bars = {
            name: bar
            for panel in (left, right)
            for bar, name in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        names = [name for name, _ in BARS.values() if name in bars]
        left.legend([bars[name] for name in names], names, frameon=False, loc="upper left", fontsize=8)


def _bars(axes: Any, groups: dict[str, dict[str, Row]]) -> None:
    """A bunch of bars for each group, from 0 on, each with its figure."""
    width, labelled = 0.8 / len(BARS), set()
    for place, cells in enumerate(groups.values()):
        shown = {name: row["tokens_per_s"] for name, row in cells.items() if row["skipped"] is None}
        best = best_of_vllm(cells)
        if best is not None:
            shown["best"] = shown[best]
        drawn = [name for name in BARS if name in shown]
        for index, name in enumerate(drawn):
            label, colour = BARS[name]
            at = place + (index - (len(drawn) - 1) / 2) * width
            bar = axes.bar(at, shown[name], width, color=colour, label="" if name in labelled else label)
            axes.bar_label(bar, fmt="%.0f", fontsize=7)
            labelled.add(name)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])


@contextmanager
def _picture(
    name: str, *, width: float, panels: int = 1, widths: Sequence[float] | None = None
) -> Iterator[Sequence[Any]]:
    """Panels side by side, saved as docs/images/NAME.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, panels, figsize=(width, 3.6), layout="constrained", squeeze=False, width_ratios=widths
    )
    for each in axes[0]:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", alpha=0.25)
    yield axes[0]
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / f"{name}.png", dpi=150)
    pyplot.close(figure)


def _band(axes: Any, kind: str, runs: Sequence[Sequence[float]], *, label: str | None = None) -> None:
    """Mean and range of runs, smoothed."""
    shortest = min(map(len, runs))
    table = np.array([smoothed(values[:shortest]) for values in runs])
    steps, color = np.arange(1, shortest + 1), COLOURS[kind]
    axes.fill_between(steps, table.min(axis=0), table.max(axis=0), color=color, alpha=0.18, linewidth=0)
    axes.plot(steps, table.mean(axis=0), color=color, linewidth=2, label=label or kind)
