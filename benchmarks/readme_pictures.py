"""Pictures of the README and docs/measured.md, drawn from committed rows."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks.readme_learning import laws_summary, rewards_by_run, smoothed
from benchmarks.rows import ROOT, has_rows, read

IMAGES = ROOT / "docs" / "images"
COLOURS = {"plain": "#6b7280", "two_forward": "#0f766e", "lossless": "#0f766e"}
COLOURS |= {"mixed, corrected": "#3d7fd6", "mixed, uncorrected": "#d9822b"}
COLOURS |= {"left alone": "#6b7280", "aligned": "#0f766e"}


def draw_all() -> None:
    """Those whose rows are there."""
    draw_learning()
    if has_rows("learning_laws"):
        draw_laws()
    if has_rows("trl_alignment"):
        draw_alignment()


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


@contextmanager
def _picture(name: str, *, width: float, panels: int = 1) -> Iterator[Sequence[Any]]:
    """Panels side by side, saved as docs/images/NAME.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(width, 3.6), layout="constrained", squeeze=False)
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
