"""What was measured, written from committed rows and from nothing else.

    python -m benchmarks.readme        rewrite the README's section, docs/measured.md and the pictures

A test holds both texts against the rows.
"""

from collections.abc import Sequence

import numpy as np

from benchmarks import readme_learning, readme_pictures, readme_trl
from benchmarks.rows import ROOT, Row, has_rows, read

PAGE = ROOT / "docs" / "measured.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
STOCK, STOCK_BF16 = "part4_stock", "part4_stock_bf16"
ALIGNMENT, SMOLLM2 = "part4_alignment", "part4_smollm2"


def measured_section() -> str:
    """Everything the README says in numbers."""
    return "\n\n".join((auto_table(), findings_list()))


def measured_page() -> str:
    """Everything that was measured; an experiment without rows has no section."""
    sections = (
        ("part2_auto", "Speed: the plan that chooses itself", auto_table),
        ("part1_speed", "Speed: drafts of a policy trained for them", speed_table),
        ("part2_drafts", "What an adapter drafts", drafts_table),
        ("part2_smollm2", "SmolLM2-135M-Instruct, converted by adapter", smollm2_table),
        ("part1_law", "The law, at full size", law_list),
        ("part1_learning", "GRPO: plain and drafted rollouts", readme_learning.learning_table),
        ("part2_learning", "GRPO: the target law and a mixed law", readme_learning.laws_table),
        ("part3_constraints", "Constrained outputs", constraints_table),
        ("part3_audit", "What the audit costs", audit_table),
        (
            STOCK_BF16,
            "TRL: the stock trainer and ours, in TRL's default precision",
            lambda: readme_trl.stock_table(read(STOCK_BF16), "float32 weights under bfloat16 autocast"),
        ),
        (
            STOCK,
            "TRL: the stock trainer and ours, in float32",
            lambda: readme_trl.stock_table(read(STOCK), "float32"),
        ),
        (
            ALIGNMENT,
            "TRL: drafts that follow the policy",
            lambda: readme_trl.alignment_table(read(ALIGNMENT)),
        ),
        (SMOLLM2, "TRL: SmolLM2-135M-Instruct", lambda: readme_trl.smollm2_trl_table(read(SMOLLM2))),
    )
    return "\n\n".join(
        (
            "# Measured",
            "Every figure is written from committed rows, `benchmarks/results/`, by `python -m "
            "benchmarks.readme`; `make evidence` measures them again. CPU, float32, the shipped policy of "
            "1.6M parameters unless said otherwise.",
            *(f"## {title}\n\n{text()}" for name, title, text in sections if has_rows(name)),
        )
    )


def auto_table() -> str:
    """Tokens per second of the planner against plain, the fixed plan and transformers, from one run."""
    rows = read("part2_auto")
    cells = {(row["plan"], row["batch"]): row for row in rows}
    lines = [
        "| batch | `auto`, against plain | against `generate` | steps | fixed two-forward, against plain |",
        "| ---: | ---: | ---: | --- | ---: |",
    ]
    for batch in sorted({row["batch"] for row in rows}):
        chosen, fixed = cells["auto", batch], cells["two_forward(8)", batch]
        lines.append(
            f"| {batch} | {_ratio_and_range(chosen)} | {_against_generate(cells, 'auto', batch):.2f}x "
            f"| {_shares(chosen)} | {_ratio_and_range(fixed)} |"
        )
    first = rows[0]
    caption = (
        "Tokens per second of the tiny policy's causal part with an adapter, float32, "
        f"{first['threads']} CPU thread, temperature {first['temperature']:g}, {first['queue']} rollouts for "
        f"each place in the batch: median (and range) of {first['repeats']} paired ratios of one run; "
        f"against transformers' `generate` likewise. Commit {first['commit']}."
    )
    return "\n".join((*lines, "", caption))


def _ratio_and_range(row: Row) -> str:
    return f"{row['speedup_over_plain']:.2f}x ({row['speedup_min']:.2f} to {row['speedup_max']:.2f})"


def _shares(row: Row) -> str:
    """The plans that a good share of the requests' steps took."""
    shares = sorted(row["share_by_plan"].items(), key=lambda item: -item[1])
    return ", ".join(f"{plan} {share:.0%}" for plan, share in shares if share >= 0.1)


def _against_generate(cells: dict[tuple[str, int], Row], plan: str, batch: int) -> float:
    """Median of the repeats' ratios."""
    ours, stock = (cells[name, batch]["tokens_per_s_all"] for name in (plan, "transformers_generate"))
    return float(np.median(np.divide(ours, stock)))


def findings_list() -> str:
    """The rest of the README's figures, a line each."""
    return "\n".join(
        text()
        for name, text in (
            ("part1_law", law_finding),
            ("part2_drafts", drafts_finding),
            ("part2_smollm2", smollm2_finding),
            ("part2_learning", readme_learning.laws_finding),
            ("part3_constraints", constraints_finding),
            ("part3_audit", audit_finding),
            (STOCK, lambda: readme_trl.stock_finding(read(STOCK), read(STOCK_BF16))),
            (ALIGNMENT, lambda: readme_trl.alignment_finding(read(ALIGNMENT))),
        )
        if has_rows(name)
    )


def law_finding() -> str:
    """Lossless rollouts are the policy's own."""
    texts = read("part1_law")[0]
    return (
        f"- **Lossless is the policy.** {texts['rollouts_per_plan']:,} short drafted rollouts against plain "
        f"ones: p = {texts['p_value']:.2f}, where a total variation of "
        f"{texts['detectable_total_variation_at_power_0.99']:.3f} would be found 99 times in 100."
    )


def drafts_finding() -> str:
    """What an adapter gives."""
    cells = {(row["conversion"], row["plan"], row["law"]): row for row in read("part2_drafts")}
    two_forward, fused = (
        cells["adapter", plan, "target"]["tokens_per_forward"]
        for plan in ("two_forward(8)", "fused(8,[0,4,8])")
    )
    return (
        "- **Any model drafts.** An adapter made in minutes gives the tiny policy "
        f"{two_forward:.2f} tokens per forward in two-forward steps and {fused:.2f} in fused ones."
    )


def smollm2_finding() -> str:
    """A real pretrained model."""
    cells = smollm2_cells()
    before, after = (cells[state, "two_forward(4)", 1] for state in ("before", "after"))
    chosen = cells["after", "auto", 1]
    return (
        f"- **Drafts must be good to pay.** {smollm2_sentence(before, after)} On a CPU that is "
        f"{after['speedup_over_plain']:.2f}x of plain, so `auto` takes plain steps for "
        f"{chosen['share_by_plan'].get('plain', 0):.0%} of its steps and reaches "
        f"{chosen['speedup_over_plain']:.2f}x, trials included."
    )


def smollm2_cells() -> dict[tuple[str, str, int], Row]:
    """Speed rows by state, plan and batch."""
    return {(row["state"], row["plan"], row["batch"]): row for row in read("part2_smollm2") if "batch" in row}


def smollm2_sentence(before: Row, after: Row) -> str:
    """What its conversion took and gave."""
    (conversion,) = (row for row in read("part2_smollm2") if row.get("state") == "conversion")
    return (
        f"SmolLM2-135M after {conversion['minutes']:.0f} minutes on {conversion['threads']} cores "
        f"({conversion['tokens']:,} tokens of its own): {before['tokens_per_forward']:.2f} to "
        f"{after['tokens_per_forward']:.2f} tokens per forward, two-forward."
    )


def smollm2_table() -> str:
    """Acceptance, tokens per forward and speed, before and after the conversion."""
    cells = smollm2_cells()
    lines = [
        "| adapter | plan | batch | acceptance by position | tokens per forward | against plain |",
        "| --- | --- | ---: | --- | ---: | ---: |",
    ]
    for (state, plan, batch), row in cells.items():
        positions = row["acceptance_by_position"]
        accepted = " ".join("-" if value is None else f"{value:.2f}" for value in positions or ())
        lines.append(
            f"| {'untrained' if state == 'before' else 'trained'} | {plan.replace(',[', ', [')} | {batch} "
            f"| {accepted} | {row['tokens_per_forward']:.2f} | {_ratio_and_range(row)} |"
        )
    checks = {row["check"]: row for row in read("part2_smollm2") if "check" in row}
    (law,) = (row for row in checks.values() if "p_value" in row)
    (equal,) = (row for row in checks.values() if "equal" in row)
    caption = (
        f"{smollm2_sentence(cells['before', 'two_forward(4)', 1], cells['after', 'two_forward(4)', 1])} "
        f"Temperature 1, held-out prompts, {next(iter(cells.values()))['threads']} threads. Causal logits "
        f"with and without the adapter are {'bit-identical' if equal['equal'] else 'DIFFERENT'}. Texts of "
        f"{law['rollouts_per_plan']:,} short rollouts each, two-forward against plain: p = "
        f"{law['p_value']:.2f}; a total variation of {law['detectable_total_variation_at_power_0.99']:.3f} "
        f"would be found 99 times in 100."
    )
    if any(row["speedup_max"] > 2 * row["speedup_min"] for row in cells.values()):
        caption += (
            " Where a range spans a factor of two, other work ran beside the measurement: such a ratio is "
            "not one to rely on."
        )
    return "\n".join((*lines, "", caption))


def constraints_finding() -> str:
    """Outputs that are valid as a whole."""
    rows = read("part3_constraints")
    plans = {row["plan"] for row in rows}
    steps = [
        row["tokens_per_step"]
        for row in rows
        if row["plan"] != "plain" and row["constraint"] == "json schema" and row["policy"] != "random weights"
    ]
    return (
        f"- **Constraints hold in every plan.** {sum(row['valid'] for row in rows):,} of "
        f"{sum(row['outputs'] for row in rows):,} outputs match their regular expression or JSON "
        f"schema, with SmolLM2's tokenizer, over {len(plans)} plans. What a grammar forces is committed in "
        f"blocks: {min(steps):.1f} to {max(steps):.1f} tokens of SmolLM2 a step for the JSON schema, up "
        "to 4 of them drafted."
    )


def constraints_table() -> str:
    """Valid outputs by plan and kind."""
    lines = [
        "| model | constraint | plan | valid | distinct | tokens | tokens per step | drafts accepted |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in read("part3_constraints"):
        accepted = "" if row["acceptance_rate"] is None else f"{row['acceptance_rate']:.2f}"
        lines.append(
            f"| {row['policy']} | {row['constraint']} | {row['plan'].replace(',[', ', [')} "
            f"| {row['valid']} of {row['outputs']} | {row['distinct']} | {row['tokens']:,} "
            f"| {row['tokens_per_step']:.2f} | {accepted} |"
        )
    caption = (
        "SmolLM2's tokenizer, temperature 1; two layers of random weights, and SmolLM2-135M-Instruct itself. "
        "An output counts if it is valid as a whole, judged without the library that enforced it; one that "
        "its length cut off does not."
    )
    return "\n".join((*lines, "", caption))


def audit_finding() -> str:
    """What recording every token costs."""
    rows = read("part3_audit")
    drafted, plain = (
        max(row["time_ratio"] for row in rows if (row["plan"] == "plain") == is_plain) - 1
        for is_plain in (False, True)
    )
    return (
        f"- **Every token can be audited.** Recording all of them takes at most {drafted:.1%} more time "
        f"in two-forward steps, {plain:.1%} in plain ones, and "
        f"{max(row['bytes_per_token'] for row in rows):.0f} bytes a token."
    )


def audit_table() -> str:
    """Time with the audit over time without."""
    lines = [
        "| plan | batch | time with the audit over without | bytes a token | largest difference at level 2 |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    rows = read("part3_audit")
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
        lines.append(
            f"| {batch} | {_ratio_and_range(drafted)} "
            f"| {_against_generate(cells, 'two_forward(8)', batch):.2f}x "
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


def law_list() -> str:
    """The equalities that were measured at full size."""
    (greedy,) = read("part1_greedy")
    logprobs = read("part1_logprobs")
    worst = max(row["max_difference"] for row in logprobs)
    return "\n".join(
        (
            f"- Greedy two-forward equals greedy plain on {greedy['prompts']} prompts, {greedy['tokens']:,} "
            f"tokens: {greedy['differing_rollouts_all_at_ties']} differences.",
            f"- Recorded log-probabilities differ from a fresh causal forward by at most {worst:.1e} over "
            f"{logprobs[0]['rollouts']:,} rollouts per plan.",
            _two_samples("Two-forward", read("part1_law")),
            *fused_lines(),
        )
    )


def fused_lines() -> tuple[str, str]:
    """The same for fused plans."""
    rows = read("part2_equality")
    greedy = [row for row in rows if "differing_rollouts_all_at_ties" in row]
    samples = [row for row in rows if "p_value" in row]
    names = ", ".join(row["check"].split()[1].replace(",[", ", [") for row in greedy)
    return (
        f"- Greedy {names} equal greedy plain on {greedy[0]['prompts']} prompts each: "
        f"{sum(row['differing_rollouts_all_at_ties'] for row in greedy)} differences.",
        _two_samples(samples[0]["plan"].replace(",[", ", ["), samples),
    )


def _two_samples(name: str, rows: Sequence[Row]) -> str:
    """Texts, lengths and rewards of a plan against plain."""
    texts, lengths, rewards = rows
    return (
        f"- {name} against plain, {texts['rollouts_per_plan']:,} short rollouts each: p = "
        f"{texts['p_value']:.2f} (a total variation of "
        f"{texts['detectable_total_variation_at_power_0.99']:.3f} would be found 99 times in 100); "
        f"lengths p = {lengths['p_value']:.2f}, rewards p = {rewards['p_value']:.2f} over "
        f"{rewards['rollouts_per_plan']:,} whole rollouts each."
    )


def with_section(readme: str) -> str:
    """The README with its measured section as the rows have it."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{measured_section()}\n\n{END}{after}"


if __name__ == "__main__":
    readme_pictures.draw_all()
    PAGE.write_text(measured_page() + "\n")
    readme_path = ROOT / "README.md"
    readme_path.write_text(with_section(readme_path.read_text()))
