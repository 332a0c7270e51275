"""What was measured through TRL, for the README and docs/measured.md: written from the rows it is given."""

from collections.abc import Sequence

import numpy as np

from benchmarks.ranges import listed, median_and_range, overlap, ratio
from benchmarks.rows import Row

ENDS = 10  # steps averaged at either end of a run


def stock_table(rows: Sequence[Row], precision: str) -> str:
    """Our trainer over TRL's own, side by side."""
    lines = [
        "| batch | time to generate, over TRL's | time of a step, over TRL's | the same, correction off |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for batch in sorted({row["batch"] for row in rows}):
        of_batch = [row for row in rows if row["batch"] == batch]
        cells = (
            median_and_range([row[name] for row in of_batch])
            for name in ("generate_ratio", "step_ratio", "step_ratio_uncorrected")
        )
        lines.append(f"| {batch} | {' | '.join(cells)} |")
    learning = [row for row in rows if row["batch"] == max(row["batch"] for row in rows)]
    gaps = ", ".join(f"{row['surprisal_mean']:+.4f} (error {row['surprisal_se']:.4f})" for row in learning)
    rewards = "; ".join(
        f"{name} {median_and_range([float(np.mean(row['reward'][name])) for row in learning], digits=3)}"
        for name in learning[0]["reward"]
    )
    taught = rows[0]["conversion"]
    before, after = taught["tokens_per_step"]
    worst = max(abs(ratio - 1) for row in rows for ratio in row["importance_ratio"])
    caption = (
        f"`trl.GRPOTrainer` and ours, {precision}, {rows[0]['threads']} CPU threads, fixed two-forward "
        "drafts, a step of each in turn: medians of the steps of a run, then median (and range) of "
        f"{len(learning)} seeds. Both train the tiny policy after {taught['minutes']:.0f} minutes of "
        f"`blockroll convert`: {before:.1f} tokens a step expected in its first round, {after:.1f} in its "
        f"last, and {taught['policy_kl']:.3f} nats a token (KL) from the shipped policy. TRL runs another "
        "forward for its correction, which lossless rollouts can do without. Mean reward of "
        f"{learning[0]['steps']} steps at batch "
        f"{learning[0]['batch']}: {rewards}. Importance ratio: off from 1 by {worst:.0e} at most. "
        f"Surprisal minus entropy over each run of ours: {gaps}."
    )
    return "\n".join((*lines, "", caption))


def stock_finding(rows: Sequence[Row], bf16_rows: Sequence[Row]) -> str:
    """A line for the README: what generating takes, and beside it what a whole step does."""
    batches = sorted({row["batch"] for row in rows})

    def times(of: Sequence[Row]) -> str:
        generating, stepping = (
            listed([ratio([row[name] for row in of if row["batch"] == batch]) for batch in batches])
            for name in ("generate_ratio", "step_ratio")
        )
        return f"generating takes {generating} of the stock trainer's time, a whole step {stepping}"

    return (
        f"- **In a TRL script.** At batch {listed([str(batch) for batch in batches])} {times(bf16_rows)} in "
        f"TRL's default precision; in float32 {times(rows)} (tiny policy after "
        f"{rows[0]['conversion']['minutes']:.0f} minutes of `convert`, CPU)."
    )


def alignment_table(rows: Sequence[Row]) -> str:
    """Acceptance and reward with and without alignment."""
    lines = [
        "| drafts | acceptance, first steps | last steps | kept "
        "| reward, first steps | last steps | KL at the end |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for is_aligned in (False, True):
        runs = [row for row in rows if row["is_aligned"] == is_aligned]
        acceptance = [ends(row["rollout/acceptance_rate"]) for row in runs]
        rewards = [ends(row["reward"]) for row in runs]
        cells = (
            [first for first, _ in acceptance],
            [last for _, last in acceptance],
            [last / first for first, last in acceptance],
            [first for first, _ in rewards],
            [last for _, last in rewards],
            [ends(row["kl"])[1] for row in runs],
        )
        name = "aligned after every update" if is_aligned else "left alone"
        lines.append(f"| {name} | {' | '.join(median_and_range(cell, digits=3) for cell in cells)} |")
    caption = (
        f"GRPO through TRL on arithmetic, {rows[0]['steps']} steps at temperature 1.5, the tiny policy's "
        f"causal part with an adapter: median (and range) of {len(rows) // 2} seeds, means of {ENDS} steps "
        "at either end. KL is TRL's estimate from the first policy, per token."
    )
    picture = "![Acceptance and reward, with drafts aligned and left alone](images/trl_alignment.png)"
    return "\n".join((picture, "", *lines, "", caption))


def alignment_finding(rows: Sequence[Row]) -> str:
    """A line for the README."""
    kept = {
        is_aligned: [
            last / first
            for first, last in (
                ends(row["rollout/acceptance_rate"]) for row in rows if row["is_aligned"] == is_aligned
            )
        ]
        for is_aligned in (False, True)
    }
    title, verdict = "Drafts can follow the policy.", ""
    if overlap(kept[True], kept[False]):
        title, verdict = "Alignment made no difference here.", ": ranges that overlap"
    return (
        f"- **{title}** Over {rows[0]['steps']} updates acceptance goes to {median_and_range(kept[True])} of "
        f"its start with alignment, {median_and_range(kept[False])} without{verdict}."
    )


def smollm2_trl_table(rows: Sequence[Row]) -> str:
    """SmolLM2 under GRPO, per plan."""
    lines = [
        "| rollouts | reward, first steps | last steps | drafts accepted | tokens per forward "
        "| time to generate, over plain | time of a step, over plain |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    plain = next(row for row in rows if row["plan"] == "plain")
    for row in rows:
        first, last = ends(row["reward"])
        accepted = [each for each in row["acceptance"] if each is not None]
        lines.append(
            f"| {row['plan']} | {first:.2f} | {last:.2f} "
            f"| {f'{np.mean(accepted):.2f}' if accepted else ''} | {np.mean(row['tokens_per_forward']):.2f} "
            f"| {over(row['generate_s'], plain['generate_s']):.2f} "
            f"| {over(row['step_s'], plain['step_s']):.2f} |"
        )
    caption = (
        f"SmolLM2-135M-Instruct, GRPO through TRL on one-digit sums, {rows[0]['steps']} steps of "
        f"{rows[0]['batch']} completions, 2 CPU threads, one seed: a short run, which shows that it works "
        "and what it costs, not what it would learn. Medians over steps, the first left out."
    )
    return "\n".join((*lines, "", caption))


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Means of the first and of the last steps."""
    known = [value for value in values if value is not None]
    return float(np.mean(known[:ENDS])), float(np.mean(known[-ENDS:]))


def over(values: Sequence[float], base: Sequence[float]) -> float:
    """Ratio of medians; a first step alone is all there is of a run of one."""
    tails = [each[1:] or each for each in (values, base)]
    return float(np.median(tails[0]) / np.median(tails[1]))
