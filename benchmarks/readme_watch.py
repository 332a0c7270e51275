"""What the guard's experiments gave, for docs/measured.md and its picture."""

import math
import statistics
from collections.abc import Sequence

import numpy as np

from benchmarks.rows import Row

ENDS = 10  # updates at either end of a run whose mean is told
_LOSSLESS, _MIXED = ("lossless, left alone", "lossless, aligned"), "mixed, left alone"


def false_alarms_table(rows: Sequence[Row]) -> str:
    """Runs in which each test spoke without cause, and how many its alpha allows."""
    num_runs, alpha = sum(row["num_runs"] for row in rows), rows[0]["alpha"]
    names = [name for name in rows[0]["spoke"] if name != "any"]
    most = _upper(num_runs, alpha)
    lines = ["| test | null runs in which it spoke | share |", "| --- | ---: | ---: |"]
    for name in (*names, "any"):
        count = sum(row["spoke"][name] for row in rows)
        what = "any of them" if name == "any" else f"`{name}`"
        lines.append(f"| {what} | {count} | {count / num_runs:.2%} |")
    budget = len(names) * alpha
    caption = (
        f"{num_runs:,} simulated runs of {rows[0]['num_steps']:,} steps in which every claim holds at its "
        f"very edge, each test looked at after every step, at alpha {alpha:g} for each (in use it is a "
        f"millionth for those of a fault). Allowed are {alpha:.0%}, with chance up to {most} runs of a test "
        f"(99.9 %), and {budget:.0%} for any of the {len(names)}."
    )
    return "\n".join((*lines, "", caption))


def _upper(num_runs: int, alpha: float) -> int:
    """The 99.9 % quantile of a binomial count, by its normal approximation."""
    return math.ceil(num_runs * alpha + 3.09 * math.sqrt(num_runs * alpha * (1 - alpha)))


def power_table(rows: Sequence[Row]) -> str:
    """How much is drawn until a fault is told."""
    lines = [
        "| planted | told by | values until then | drawn, median | drawn, most |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        drawn = (f"{row[name]:,.0f} {row['unit']}" for name in ("drawn", "drawn_most"))
        lines.append(f"| {row['fault']} | `{row['test']}` | {row['values']:,.0f} | {' | '.join(drawn)} |")
    caption = (
        f"The tiny policy at temperature 1.5, {rows[0]['seeds']} seeds each, every decoding step looked at, "
        "at the default alphas. With `rollout.watch_every=32` the calibration tests see a 32nd part of the "
        "tokens, so what is drawn until they speak is about 32 times as much; `learner` sees all."
    )
    return "\n".join((*lines, "", caption))


def silent_table(rows: Sequence[Row]) -> str:
    """What the tests of sound runs came to."""
    names = sorted(
        {name.removesuffix("/log_e_max") for row in rows for name in row if name.endswith("log_e_max")}
    )
    lines = [
        "| test | values, all runs | most log e of a run | it speaks at |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name in names:
        found = [row for row in rows if f"{name}/log_e_max" in row]
        count = sum(row[f"{name}/n"] for row in found)
        most = max(row[f"{name}/log_e_max"] for row in found)
        at = found[0][f"{name}/threshold"]
        lines.append(f"| `{name.removeprefix('drift/')}` | {count:,.0f} | {most:.1f} | {at:.1f} |")
    said = sum(len(row["said"]) for row in rows)
    caption = (
        f"{len(rows)} lossless runs of the tiny policy by `auto`, {rows[0]['steps']} steps each: the guard "
        f"spoke {said} times."
    )
    return "\n".join((*lines, "", caption))


def arms(rows: Sequence[Row]) -> dict[str, dict[int, list[Row]]]:
    """Rows of steps, by arm and seed."""
    found: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        found.setdefault(row["arm"], {}).setdefault(row["seed"], []).append(row)
    return found


def fell_back_at(run: Sequence[Row]) -> int | None:
    """The step after which rollouts were no longer drawn as asked."""
    return next((row["step"] for row in run if row["guard/action"] in ("lossless", "plain")), None)


def evaluations(run: Sequence[Row]) -> list[float]:
    """Held-out rewards of a run, in order."""
    return [row["eval/reward"] for row in run if row.get("eval/reward") is not None]


def harm_table(rows: Sequence[Row]) -> str:
    """Reward with and without the guard."""
    lines = [
        "| rollouts | reward of rollouts, last third | held-out reward at the end | fell back after step |",
        "| --- | ---: | ---: | ---: |",
    ]
    for arm, seeds in arms(rows).items():
        last = [np.mean([row["reward"] for row in run[-len(run) // 3 :]]) for run in seeds.values()]
        held_out = [evaluations(run)[-1] for run in seeds.values()]
        when = [fell_back_at(run) for run in seeds.values()]
        told = ", ".join(map(str, when)) if any(when) else "-"
        lines.append(f"| {arm} | {_spread(last)} | {_spread(held_out)} | {told} |")
    steps = max(row["step"] for row in rows)
    shadow = [row["shadow/duration_s"] / row["step_time"] for row in rows if row.get("shadow/duration_s")]
    caption = (
        f"GRPO of the tiny policy, {steps} steps, {len(arms(rows)['mixed'])} seeds, rollouts of the mixed "
        f"law of weight {rows[0]['mix_weight']:g}, not corrected; evaluations by the law in use, mean and "
        f"range. The guard compares {rows[0]['shadow_share']:.0%} of the prompts under both laws, in "
        f"{statistics.median(shadow):.0%} of a step's time, and falls back when the loss is shown."
    )
    picture = "![Reward under a mixed law, with and without the guard](images/watch_harm.png)"
    return "\n".join((picture, "", *lines, "", caption))


def harm_finding(rows: Sequence[Row]) -> str:
    """One line for the README."""
    found = {
        arm: float(np.mean([evaluations(run)[-1] for run in seeds.values()]))
        for arm, seeds in arms(rows).items()
    }
    when = [fell_back_at(run) for run in arms(rows)["mixed, guarded"].values()]
    if None in when:
        told = f"falls back in {sum(step is not None for step in when)} of {len(when)} seeds"
    else:
        told = f"falls back after step {' and '.join(map(str, sorted({*filter(None, when)})))}"
    return (
        f"- **A guard that acts.** Under a mixed law that earns less, it {told}; held-out reward ends at "
        f"{found['mixed, guarded']:.3f}, against {found['mixed']:.3f} without it and {found['lossless']:.3f} "
        "of lossless rollouts ([watch](docs/watch.md))."
    )


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def cost_table(rows: Sequence[Row]) -> str:
    """What looking costs."""
    lines = ["| what | plan | time | range | plain against itself |", "| --- | --- | ---: | ---: | ---: |"]
    for row in rows:
        if "over_unwatched" in row:
            band = "{:.3f} to {:.3f}".format(*row["band"])
            cells = (f"{row['over_unwatched']:.3f}x", "{:.3f} to {:.3f}".format(*row["range"]), band)
        else:
            cells = (f"{row['over_drawing']:.2%}", "{:.2%} to {:.2%}".format(*row["range"]), "")
        lines.append(f"| {row['what']} | {row['plan']} | {' | '.join(cells)} |")
    return "\n".join(
        (*lines, "", f"The tiny policy, batch {rows[0]['batch']}, one thread, in turns; medians and ranges.")
    )


def by_arm(rows: Sequence[Row], name: str) -> dict[str, list[list[float]]]:
    """A curve of every run, by arm."""
    found: dict[str, list[list[float]]] = {}
    for row in rows:
        found.setdefault(row["arm"], []).append(row[name])
    return found


def acceptance_table(rows: Sequence[Row]) -> str:
    """Where acceptance and reward begin and end, by arm."""
    lines = [
        "| rollouts, drafts | acceptance, first | last | reward, first | last | KL from the first policy |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    accepted, rewards = _ends(rows, "rollout/acceptance_rate"), _ends(rows, "reward")
    for arm, kls in by_arm(rows, "kl").items():
        ends = " | ".join(f"{end:.3f}" for end in (*accepted[arm], *rewards[arm]))
        lines.append(f"| {arm} | {ends} | {_spread([float(np.mean(kl[-ENDS:])) for kl in kls])} |")
    picture = "![Reward against acceptance over RL runs](images/watch_acceptance.png)"
    seeds, weight = len({row["seed"] for row in rows}), min(float(row["mix_weight"]) for row in rows)
    caption = (
        f"TRL's GRPO of the tiny policy with our rollouts, {rows[0]['steps']} updates, means of {seeds} "
        f"seeds over the first and the last {ENDS}; mixed rollouts have weight {weight:g} and are corrected "
        "by token. Reward and acceptance are of the law in use. KL in nats a token, with its range."
    )
    return "\n".join((picture, "", *lines, "", caption))


def _ends(rows: Sequence[Row], name: str) -> dict[str, tuple[float, float]]:
    """Means over the first and the last updates, by arm."""
    return {
        arm: (
            float(np.mean([np.mean(curve[:ENDS]) for curve in curves])),
            float(np.mean([np.mean(curve[-ENDS:]) for curve in curves])),
        )
        for arm, curves in by_arm(rows, name).items()
    }


def acceptance_finding(rows: Sequence[Row]) -> str:
    """One line for the README."""
    accepted, rewards = _ends(rows, "rollout/acceptance_rate"), _ends(rows, "reward")
    alone, aligned, mixed = (accepted[arm] for arm in (*_LOSSLESS, _MIXED))
    earned, moved = rewards[_LOSSLESS[0]], _ends(rows, "kl")[_LOSSLESS[0]][1]
    return (
        f"- **Acceptance under RL.** Of lossless rollouts it goes from {alone[0]:.2f} to {alone[1]:.2f} as "
        f"the policy moves by {moved:.2f} nats a token, with aligned drafts to {aligned[1]:.2f}; a mixed law "
        f"accepts {mixed[1]:.2f}. Rewards go from {earned[0]:.2f} to {earned[1]:.2f} and, mixed, from "
        f"{rewards[_MIXED][0]:.2f} to {rewards[_MIXED][1]:.2f}."
    )
