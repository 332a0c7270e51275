"""What drafts and constraints gave, for the README and docs/measured.md."""

from benchmarks.readme_speed import ratio_and_range
from benchmarks.rows import Row, read


def drafts_finding() -> str:
    """What an adapter gives."""
    cells = {(row["conversion"], row["plan"], row["law"]): row for row in read("drafts_conversions")}
    two_forward, fused = (
        cells["adapter", plan, "target"]["tokens_per_forward"]
        for plan in ("two_forward(8)", "fused(8,[0,4,8])")
    )
    return (
        "- **Any model drafts.** An adapter made in minutes gives the tiny policy "
        f"{two_forward:.2f} tokens per forward in two-forward steps and {fused:.2f} in fused ones."
    )


def drafts_table() -> str:
    """What an adapter drafts next to the training of all weights, under both laws."""
    cells = {(row["conversion"], row["plan"], row["law"]): row for row in read("drafts_conversions")}
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


def smollm2_finding() -> str:
    """A real pretrained model."""
    cells = smollm2_cells()
    before, after = (cells[state, "two_forward(4)", 1] for state in ("before", "after"))
    chosen = cells["after", "auto", 1]
    return (
        f"- **Drafts must be good to pay.** {smollm2_sentence(before, after)} On a CPU that is "
        f"{after['speedup_over_plain']:.2f}x of plain, so `auto` takes plain steps for "
        f"{chosen['share_by_plan'].get('plain', 0):.0%} of its steps and reaches "
        f"{ratio_and_range(chosen)}, trials included."
    )


def smollm2_cells() -> dict[tuple[str, str, int], Row]:
    """Speed rows by state, plan and batch."""
    return {
        (row["state"], row["plan"], row["batch"]): row for row in read("drafts_smollm2") if "batch" in row
    }


def smollm2_sentence(before: Row, after: Row) -> str:
    """What its conversion took and gave."""
    (conversion,) = (row for row in read("drafts_smollm2") if row.get("state") == "conversion")
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
            f"| {accepted} | {row['tokens_per_forward']:.2f} | {ratio_and_range(row)} |"
        )
    checks = {row["check"]: row for row in read("drafts_smollm2") if "check" in row}
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
    rows = read("constraints_outputs")
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
    for row in read("constraints_outputs"):
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
