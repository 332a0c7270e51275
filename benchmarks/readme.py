"""The README's measured results, written from committed rows and from nothing else.

    python -m benchmarks.readme        rewrite the section between the markers, and the picture

A test holds the README against the rows.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "images" / "part1_learning.png"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
WINDOW = 5  # steps whose rewards are averaged at either end of a run


def read(name: str) -> list[Row]:
    """Rows of one result file."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def measured_section() -> str:
    """Everything the README says in numbers."""
    return "\n\n".join((speed_table(), drafts_table(), learning_table(), law_list()))


def speed_table() -> str:
    """Tokens per second against plain decoding, from one run."""
    rows = read("part1_speed")
    cells = {(row["plan"], row["batch"]): row for row in rows}
    lines = [
        "| batch | two-forward, against plain | against transformers `generate` | drafts accepted "
        "| tokens per forward | host ms per step |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for batch in sorted({row["batch"] for row in rows}):
        drafted = cells["two_forward(8)", batch]
        stock = np.median(
            np.divide(drafted["tokens_per_s_all"], cells["transformers_generate", batch]["tokens_per_s_all"])
        )
        lines.append(
            f"| {batch} | {drafted['speedup_over_plain']:.2f}x "
            f"({drafted['speedup_min']:.2f} to {drafted['speedup_max']:.2f}) | {stock:.2f}x "
            f"| {drafted['acceptance_rate']:.2f} | {drafted['tokens_per_forward']:.2f} "
            f"| {drafted['host_ms_per_step']:.2f} |"
        )
    first = rows[0]
    caption = (
        f"Tokens per second of the tiny policy, float32, {first['threads']} CPU thread, temperature "
        f"{first['temperature']:g}, K = 8, prompts of {first['context']} tokens, completions of "
        f"{first['mean_length']:.0f}: median (and range) of {first['repeats']} paired ratios of one run, "
        f"commit {first['commit']}."
    )
    return "\n".join((*lines, "", caption))


def drafts_table() -> str:
    """What an adapter drafts next to the training of all weights, under both laws."""
    cells = {(row["conversion"], row["plan"], row["law"]): row for row in read("part2_drafts")}
    lines = [
        "| drafts by | plan | accepted | tokens per forward | with draft logits mixed in by half |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for (conversion, plan, law), row in cells.items():
        if law == "target":
            mixed = cells[conversion, plan, "mixed(0.5)"]
            lines.append(
                f"| {conversion} | {plan.replace(',[', ', [')} | {row['acceptance_rate']:.2f} "
                f"| {row['tokens_per_forward']:.2f} | {mixed['tokens_per_forward']:.2f} |"
            )
    count = next(iter(cells.values()))["rollouts"]
    caption = (
        f"Tokens per forward of the tiny policy on {count} held-out problems at temperature 1: all its "
        "weights trained to draft (`full`), or its causal part untouched, and an adapter made by "
        "`blockroll convert`."
    )
    return "\n".join((*lines, "", caption))


def rewards_by_run() -> dict[str, dict[int, list[float]]]:
    """Reward of every step, by plan and seed."""
    rewards: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read("part1_learning"):
        rewards[row["plan_config"]][row["seed"]].append(row["reward"])
    return rewards


def learning_summary() -> dict[str, list[tuple[float, float]]]:
    """Mean reward over the first and last steps of every run, by plan, in order of seeds."""
    return {
        plan: [
            (float(np.mean(values[:WINDOW])), float(np.mean(values[-WINDOW:])))
            for _, values in sorted(seeds.items())
        ]
        for plan, seeds in sorted(rewards_by_run().items())
    }


def band_overlap() -> float:
    """Share of steps at which the bands that the seeds span, of smoothed rewards, overlap."""
    tables = [np.array([*map(smoothed, seeds.values())]) for seeds in rewards_by_run().values()]
    low = np.max([table.min(axis=0) for table in tables], axis=0)
    high = np.min([table.max(axis=0) for table in tables], axis=0)
    return float(np.mean(low <= high))


def learning_table() -> str:
    """Where GRPO starts and ends, per plan."""
    rows = read("part1_learning")
    lines = [
        f"| rollouts | reward, first {WINDOW} steps | reward, last {WINDOW} steps | least rise of a seed |",
        "| --- | ---: | ---: | ---: |",
    ]
    for plan, ends in learning_summary().items():
        first, last = np.mean(ends, axis=0)
        rise = min(end - start for start, end in ends)
        lines.append(f"| {plan.replace('_', '-')} | {first:.3f} | {last:.3f} | {rise:+.3f} |")
    steps, seeds = max(row["step"] for row in rows), len({row["seed"] for row in rows})
    stages = rows[0]["stages"]
    caption = (
        f"GRPO on arithmetic from the tiny policy, {steps} steps at temperature {rows[0]['temperature']:g}, "
        f"means of {seeds} seeds. The rate falls to 0 in each of {len(stages)} stages. "
        f"The bands of the two plans overlap in {band_overlap():.0%} of the steps."
    )
    return "\n".join((*lines, "", caption))


def law_list() -> str:
    """The equalities that were measured at full size."""
    (greedy,) = read("part1_greedy")
    logprobs = read("part1_logprobs")
    texts, lengths, rewards = read("part1_law")
    worst = max(row["max_difference"] for row in logprobs)
    return "\n".join(
        (
            f"- Greedy two-forward equals greedy plain on {greedy['prompts']} prompts, {greedy['tokens']:,} "
            f"tokens: {greedy['differing_rollouts_all_at_ties']} differences.",
            f"- Recorded log-probabilities differ from a fresh causal forward by at most {worst:.1e} over "
            f"{logprobs[0]['rollouts']:,} rollouts per plan.",
            f"- Two-forward against plain, {texts['rollouts_per_plan']:,} short rollouts each: p = "
            f"{texts['p_value']:.2f} (a total variation of "
            f"{texts['detectable_total_variation_at_power_0.99']:.3f} would be found 99 times in 100); "
            f"lengths p = {lengths['p_value']:.2f}, rewards p = {rewards['p_value']:.2f} over "
            f"{rewards['rollouts_per_plan']:,} whole rollouts each.",
        )
    )


def with_section(readme: str) -> str:
    """The README with its measured section as the rows have it."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{measured_section()}\n\n{END}{after}"


def draw_learning(path: Path = PICTURE) -> None:
    """Reward over steps: the mean of the seeds and the band they span, per plan."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    for (plan, seeds), color in zip(sorted(rewards_by_run().items()), ("#6b7280", "#0f766e"), strict=True):
        table = np.array([smoothed(values) for _, values in sorted(seeds.items())])
        steps = np.arange(1, table.shape[1] + 1)
        axes.fill_between(steps, table.min(axis=0), table.max(axis=0), color=color, alpha=0.18, linewidth=0)
        axes.plot(steps, table.mean(axis=0), color=color, linewidth=2, label=plan.replace("_", "-"))
    axes.set(xlabel="step", ylabel="reward", title=f"GRPO, mean and band of {len(table)} seeds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, loc="lower right", title="rollouts")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def smoothed(values: Sequence[float]) -> list[float]:
    """Running mean over the last WINDOW steps."""
    return [float(np.mean(values[max(0, i - WINDOW + 1) : i + 1])) for i in range(len(values))]


if __name__ == "__main__":
    draw_learning()
    readme_path = ROOT / "README.md"
    readme_path.write_text(with_section(readme_path.read_text()))
