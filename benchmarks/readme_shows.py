"""Drafts that never change a token, and the plan that chooses itself: for the README and docs/measured.md."""

from collections.abc import Sequence

import numpy as np

from benchmarks.ranges import median_and_range
from benchmarks.rows import Row
from benchmarks.turns import AGAIN, PLAIN

GENERATE = "transformers_generate"


def equality_table(rows: Sequence[Row]) -> str:
    """Rollouts under every plan that differ from plain ones, and the way they were decoded."""
    lines = [
        "| plan | decoded | rollouts | temperature | tokens | different | near-ties | drafts accepted |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['plan'].replace(',[', ', [')} | {row['how']} | {row['rollouts']:,} "
        f"| {row['temperature']:g} | {row['tokens']:,} "
        f"| {row['different']:,} | {row['near_ties']} | {row['accepted_drafts']:,} |"
        for row in rows
    ]
    gap = max(row["largest_logprob_gap"] for row in rows)
    caption = (
        "The tiny policy's causal part with an adapter, argmax drafts, groups of 8 siblings: each row "
        "against the same requests decoded plainly in batches of 64. A near-tie is a rollout whose first "
        "token that differs hung on rounding: its coin within 1e-5 of a boundary or, greedily, the two best "
        f"logits within 1e-4. Up to there log-probabilities differ by {gap:.0e} at most."
    )
    named = [f"{row['plan']}, {row['how']}: {'; '.join(row['named'])}" for row in rows if row["named"]]
    if named:
        caption += " Those that differ, by name: " + ". ".join(named) + "."
    return "\n".join((*lines, "", caption))


def equality_finding(rows: Sequence[Row]) -> str:
    """A line for the README."""
    different, ties, count = (
        sum(row[name] for row in rows) for name in ("different", "near_ties", "rollouts")
    )
    num_plans = len({row["plan"] for row in rows})
    return (
        f"- **Drafts that never change a token.** Of {count:,} rollouts under {num_plans} plans, alone, in "
        f"batches, on two replicas, killed and gone on with, {different:,} differ from plain ones, and "
        f"{ties} at a near-tie of rounding."
    )


def grid_table(rows: Sequence[Row]) -> str:
    """`auto` in every cell."""
    cells = {(row["plan"], row["batch"], row["context"]): row for row in rows}
    lines = [
        "| context | batch | `auto`, against plain | best fixed plan, against plain | regret "
        "| predicted / achieved | against `generate` | plain, again |",
        "| ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    chosen = [row for row in rows if row["plan"] == "auto"]
    for row in chosen:
        where = row["batch"], row["context"]
        best = cells[row["best_fixed"], *where]
        stock = cells.get((GENERATE, *where))
        over_stock = f"{stock['auto_over_it']:.2f}x" if stock else ""
        lines.append(
            f"| {row['context']:,} | {row['batch']} | {times(row)} "
            f"| {best['plan'].replace(',[', ', [')} {times(best)} | {row['regret']:+.1%} "
            f"| {row['predicted_over_achieved']:.2f} | {over_stock} | {times(cells[AGAIN, *where])} |"
        )
    regret = np.median([row["regret"] for row in chosen])
    off = [abs(row["predicted_over_achieved"] - 1) for row in chosen]
    first = rows[0]
    caption = (
        f"The tiny policy's causal part with an adapter, {first['dtype']}, {first['threads']} CPU thread, "
        f"temperature {first['temperature']:g}, {first['machine']}: median (and range) of "
        f"{first['repeats']} paired ratios of tokens a second, prefill included. Regret is how far decode "
        f"steps of `auto` stay behind those of the best fixed plan, median {regret:+.1%}; predicted and "
        f"achieved are its decode steps' speed over plain's, apart by {np.median(off):.0%} in the median. "
        "Siblings share a prompt, which `generate` prefills for each. The last column is the band: the same "
        "plain decoding once more."
    )
    return "\n".join((*lines, "", caption))


def longtail_table(rows: Sequence[Row]) -> str:
    """Time to the last token."""
    lines = [
        "| policy | prompts | plan | time to the last token | over plain | tokens a step | steps |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    lines += [
        f"| {row['policy']} | {row['prompts']} | {row['plan']} | {row['seconds']:.2f} s "
        f"| {median_and_range(row['time_over_plain_all'])} | {row['tokens_per_step']:.2f} | {shares(row)} |"
        for row in rows
    ]
    firsts = {row["policy"]: row for row in reversed(rows)}
    measured = "; ".join(
        f"{name}, {first['machine']}: {first['rollouts']} requests at once in {first['batch']} places, "
        f"lengths of {first['length_median']:.0f} tokens in the median, {first['length_mean']:.0f} in the "
        f"mean, {first['length_longest']} at most, {first['repeats']} repeats in turns"
        for name, first in sorted(firsts.items(), reverse=True)
    )
    caption = (
        f"{rows[0]['threads']} CPU thread; {measured}. The tiny policy is its causal part with an adapter. "
        "Median (and range) of the repeats: below 1 is faster than plain."
    )
    return "\n".join((*lines, "", caption))


def grouped_table(rows: Sequence[Row]) -> str:
    """SmolLM2 on grouped rollouts: both epochs, and each."""
    cells = {
        (row["prompts"], row["temperature"], row["batch"], row["plan"], row["epoch"]): row for row in rows
    }
    lines = [
        "| prompts | temperature | batch | `auto`, against plain | by CPU time | first epoch | second "
        "| tokens a step | sampler | plain, again |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    settings = dict.fromkeys((row["prompts"], row["temperature"], row["batch"]) for row in rows)
    for setting in settings:
        both, first, second = (cells[*setting, "auto", epoch] for epoch in ("both", 1, 2))
        prompts, temperature, batch = setting
        lines.append(
            f"| {prompts} | {temperature:g} | {batch} | {times(both)} | {both['cpu_speedup']:.2f}x "
            f"| {first['speedup']:.2f}x | {second['speedup']:.2f}x | {both['tokens_per_step']:.2f} "
            f"| {both['sampler_share']:.0%} | {times(cells[*setting, AGAIN, 'both'])} |"
        )
    about = rows[0]
    caption = (
        f"{about['policy']} untouched, {about['dtype']}, {about['threads']} CPU thread, {about['machine']}: "
        f"{about['siblings']} siblings a prompt, the same prompts in two epochs, median (and range) of "
        f"{cells[*next(iter(settings)), PLAIN, 'both']['repeats']} paired ratios of tokens a second, prefill "
        "included. Sampler: its share of the steps. The last column is the band: the same plain decoding "
        "once more."
    )
    return "\n".join((*lines, "", caption))


def grpo_table(rows: Sequence[Row]) -> str:
    """GRPO of SmolLM2 by TRL's trainer, ours and our loop."""
    lines = [
        "| by | rollouts | time to generate, over TRL's | time of a step, over TRL's "
        "| time to generate, over plain | time of a step, over plain | tokens per forward | reward |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for by, plan in dict.fromkeys((row["by"], row["plan"]) for row in rows):
        runs = [row for row in rows if (row["by"], row["plan"]) == (by, plan)]
        cells = (
            median_and_range([row[name] for row in runs]) if name in runs[0] else ""
            for name in ("generate_over_trl", "step_over_trl", "generate_over_plain", "step_over_plain")
        )
        forwards = [each for row in runs for each in row["tokens_per_forward"] if each is not None]
        lines.append(
            f"| {by} | {plan} | {' | '.join(cells)} | {f'{np.mean(forwards):.2f}' if forwards else ''} "
            f"| {median_and_range([float(np.mean(row['reward'])) for row in runs], digits=3)} |"
        )
    first = rows[0]
    precision = "float32 weights under bfloat16 autocast" if first["bf16"] else "float32"
    caption = (
        f"SmolLM2-135M-Instruct on worked sums, {first['steps']} steps of {first['prompts_per_step']} "
        f"prompts of {first['prompts']}, {first['siblings']} siblings each, up to {first['max_tokens']} "
        "tokens; a step of each in turn. Medians of the ratios of steps, the first left out, then median "
        f"(and range) of {len({row['seed'] for row in rows})} seeds; reward is the mean of a run. TRL's "
        f"trainers compute in {precision}, our loop in float32: beside TRL's its times say less than beside "
        "its own plain ones."
    )
    return "\n".join((*lines, "", caption))


def times(row: Row) -> str:
    """A ratio to plain with its range."""
    return f"{row['speedup']:.2f}x ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"


def shares(row: Row) -> str:
    """The plans that a good share of the requests' steps took."""
    return ", ".join(f"{plan} {share:.0%}" for plan, share in row["share_by_plan"].items() if share >= 0.1)
