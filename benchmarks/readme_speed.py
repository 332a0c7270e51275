"""Speed, and what the audit costs, for the README and docs/measured.md."""

from collections.abc import Sequence

import numpy as np

from benchmarks.rows import Row, read


def auto_table() -> str:
    """Tokens per second of the planner against plain, the fixed plan and transformers, from one run."""
    rows = read("speed_auto")
    cells = {(row["plan"], row["batch"]): row for row in rows}
    lines = [
        "| batch | `auto`, against plain | against `generate` | steps | fixed two-forward, against plain |",
        "| ---: | ---: | ---: | --- | ---: |",
    ]
    for batch in sorted({row["batch"] for row in rows}):
        chosen, fixed = cells["auto", batch], cells["two_forward(8)", batch]
        lines.append(
            f"| {batch} | {ratio_and_range(chosen)} | {against_generate(cells, 'auto', batch):.2f}x "
            f"| {shares(chosen)} | {ratio_and_range(fixed)} |"
        )
    first = rows[0]
    caption = (
        "Tokens per second of the tiny policy's causal part with an adapter, float32, "
        f"{first['threads']} CPU thread, temperature {first['temperature']:g}, {first['queue']} rollouts for "
        f"each place in the batch: median (and range) of {first['repeats']} paired ratios of one run; "
        f"against transformers' `generate` likewise. A range that holds 1 shows no difference. Commit "
        f"{first['commit']}."
    )
    return "\n".join((*lines, "", caption))


def speed_table() -> str:
    """Tokens per second against plain decoding, from one run."""
    rows = read("speed_drafts")
    cells = {(row["plan"], row["batch"]): row for row in rows}
    lines = [
        "| batch | two-forward, against plain | against transformers `generate` | drafts accepted "
        "| tokens per forward | host ms per step |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for batch in sorted({row["batch"] for row in rows}):
        drafted = cells["two_forward(8)", batch]
        lines.append(
            f"| {batch} | {ratio_and_range(drafted)} "
            f"| {against_generate(cells, 'two_forward(8)', batch):.2f}x "
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


def audit_table() -> str:
    """Time with the audit over time without."""
    lines = [
        "| plan | batch | time with the audit over without | bytes a token | largest difference at level 2 |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    rows = read("audit_cost")
    for row in rows:
        lines.append(
            f"| {row['plan']} | {row['batch']} "
            f"| {row['time_ratio']:.3f} ({row['time_ratio_low']:.3f} to {row['time_ratio_high']:.3f}) "
            f"| {row['bytes_per_token']:.0f} | {row['largest_difference']:.1e} |"
        )
    caption = (
        f"Tiny policy, 1 CPU thread, every token of every request: median (and middle half) of "
        f"{rows[0]['repeats']} paired ratios of one run. What was written passes both levels of the check."
    )
    return "\n".join((*lines, "", caption))


def audit_finding() -> str:
    """What recording every token costs."""
    rows = read("audit_cost")
    drafted, plain = (
        max(row["time_ratio"] for row in rows if (row["plan"] == "plain") == is_plain) - 1
        for is_plain in (False, True)
    )
    return (
        f"- **Every token can be audited.** Recording all of them takes at most {drafted:.1%} more time "
        f"in two-forward steps, {plain:.1%} in plain ones, and "
        f"{max(row['bytes_per_token'] for row in rows):.0f} bytes a token."
    )


def before_after_table(rows: Sequence[Row]) -> str:
    """Times of two commits, measured in pairs."""
    lines = [
        "| time of | policy | plan | batch | before | after | after over before |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        times = (f"{1e3 * row[f'{side}_s']:,.2f} ms" for side in ("before", "after"))
        spread = f"{row['time_ratio']:.2f} ({row['time_ratio_low']:.2f} to {row['time_ratio_high']:.2f})"
        subject = (str(row.get(name, "")) for name in ("policy", "plan", "batch"))
        lines.append(f"| {row['what']} | {' | '.join(subject)} | {' | '.join(times)} | {spread} |")
    first = rows[0]
    caption = (
        f"The same work by commits {first['before_commit']} and {first['after_commit']}, one after the "
        f"other, 1 CPU thread, {first['machine']}: medians of {first['pairs']} pairs, and median (and range) "
        "of their ratios. Below 1 is faster; a range that holds 1 shows no difference."
    )
    return "\n".join((*lines, "", caption))


def ratio_and_range(row: Row) -> str:
    """Speed over plain: median, smallest and largest repeat."""
    return f"{row['speedup_over_plain']:.2f}x ({row['speedup_min']:.2f} to {row['speedup_max']:.2f})"


def paired(ours: Sequence[float], others: Sequence[float]) -> str:
    """Ratios within each repeat: median, smallest and largest."""
    ratios = np.divide(ours, others)
    return f"{np.median(ratios):.2f}x ({ratios.min():.2f} to {ratios.max():.2f})"


def shares(row: Row) -> str:
    """The plans that a good share of the requests' steps took."""
    shares = sorted(row["share_by_plan"].items(), key=lambda item: -item[1])
    return ", ".join(f"{plan} {share:.0%}" for plan, share in shares if share >= 0.1)


def against_generate(cells: dict[tuple[str, int], Row], plan: str, batch: int) -> float:
    """Median of the repeats' ratios."""
    ours, stock = (cells[name, batch]["tokens_per_s_all"] for name in (plan, "transformers_generate"))
    return float(np.median(np.divide(ours, stock)))
