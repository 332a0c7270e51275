"""What the GRPO runs gave, for the README and docs/measured.md."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.ranges import overlap
from benchmarks.rows import read

WINDOW = 5  # steps whose rewards are averaged at either end of a run


def rewards_by_run() -> dict[str, dict[int, list[float]]]:
    """Reward of every step, by plan and seed."""
    rewards: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read("learning_plans"):
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
    rows = read("learning_plans")
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
    picture = "![Reward of GRPO on plain and on drafted rollouts](images/learning_plans.png)"
    return "\n".join((picture, "", *lines, "", caption))


@dataclass(frozen=True, slots=True, kw_only=True)
class LawSummary:
    """The runs of one law, seed by seed."""

    rewards: list[list[float]]  # by step
    acceptance: list[list[float]]  # by step; none for plain
    effective: float  # sample size as a share, mean of the steps
    held_out_rewards: list[float]

    @property
    def held_out(self) -> str:
        """Mean and range of the seeds."""
        values = self.held_out_rewards
        return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def laws_summary() -> dict[str, LawSummary]:
    """By variant, in the order of the runs."""
    rows = read("learning_laws")
    found = {}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        seeds = sorted({row["seed"] for row in own})
        steps = [[row for row in own if row["seed"] == seed and "step" in row] for seed in seeds]
        found[variant] = LawSummary(
            rewards=[[row["reward"] for row in run] for run in steps],
            acceptance=[
                [row["rollout/acceptance_rate"] for row in run if row.get("rollout/acceptance_rate")]
                for run in steps
            ],
            effective=float(np.mean([row["rollout/effective_sample_size"] for run in steps for row in run])),
            held_out_rewards=[row["held_out_reward"] for row in own if "held_out_reward" in row],
        )
    return found


def laws_table() -> str:
    """What each law's runs gave, and what correction buys."""
    lines = [
        f"| rollouts | reward, first {WINDOW} steps | last {WINDOW} | accepted, first {WINDOW} "
        f"| last {WINDOW} | effective sample size | held-out reward of the last weights |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    laws = laws_summary()
    for variant, law in laws.items():
        rewards = np.array(law.rewards)
        accepted = ["-", "-"]
        if all(law.acceptance):
            table = np.array([[np.mean(run[:WINDOW]), np.mean(run[-WINDOW:])] for run in law.acceptance])
            accepted = [f"{value:.2f}" for value in table.mean(axis=0)]
        lines.append(
            f"| {variant} | {rewards[:, :WINDOW].mean():.3f} | {rewards[:, -WINDOW:].mean():.3f} "
            f"| {accepted[0]} | {accepted[1]} | {law.effective:.4f} | {law.held_out} |"
        )
    plain = laws["plain"]
    problems = next(row["held_out_problems"] for row in read("learning_laws") if "held_out_problems" in row)
    caption = (
        f"GRPO on arithmetic, {len(plain.rewards[0])} steps, {len(plain.rewards)} seeds, temperature 1.5. "
        "The rewards of the first columns are those of the rollouts, under the law they were drawn from: "
        "mixed rollouts score differently from the policy they train. The last column is the policy: plain "
        f"decoding of {problems:,} held-out problems at temperature 1, mean (and range) of the seeds."
    )
    picture = "![Reward and acceptance of GRPO under both laws](images/learning_laws.png)"
    return "\n".join((picture, "", *lines, "", caption))


def laws_finding() -> str:
    """What GRPO makes of each law."""
    laws = laws_summary()
    return (
        "- **What a law costs, and what correcting it buys.** Held-out reward after GRPO, mean and range of "
        f"{len(laws['plain'].rewards)} seeds: {laws['plain'].held_out} on plain rollouts, "
        f"{laws['lossless'].held_out} on lossless drafts; on drafts mixed in by half "
        f"{laws['mixed, corrected'].held_out} with importance weights and "
        f"{laws['mixed, uncorrected'].held_out} without."
        + "".join(
            f" The ranges of {a} and {b} overlap: no difference was shown."
            for (a, left), (b, right) in itertools.combinations(laws.items(), 2)
            if overlap(left.held_out_rewards, right.held_out_rewards)
        )
    )


def smoothed(values: Sequence[float]) -> list[float]:
    """Running mean over the last WINDOW steps."""
    return [float(np.mean(values[max(0, i - WINDOW + 1) : i + 1])) for i in range(len(values))]
