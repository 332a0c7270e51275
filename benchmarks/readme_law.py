"""What was measured of the law, for the README and docs/measured.md."""

from collections.abc import Sequence

from benchmarks.rows import Row, read


def law_finding() -> str:
    """Lossless rollouts are the policy's own."""
    texts = read("law_texts")[0]
    return (
        f"- **Lossless is the policy.** {texts['rollouts_per_plan']:,} short drafted rollouts against plain "
        f"ones: p = {texts['p_value']:.2f}, where a total variation of "
        f"{texts['detectable_total_variation_at_power_0.99']:.3f} would be found 99 times in 100."
    )


def law_list() -> str:
    """The equalities that were measured at full size."""
    (greedy,) = read("law_greedy")
    logprobs = read("law_logprobs")
    worst = max(row["max_difference"] for row in logprobs)
    return "\n".join(
        (
            f"- Greedy two-forward equals greedy plain on {greedy['prompts']} prompts, {greedy['tokens']:,} "
            f"tokens: {greedy['differing_rollouts_all_at_ties']} differences.",
            f"- Recorded log-probabilities differ from a fresh causal forward by at most {worst:.1e} over "
            f"{logprobs[0]['rollouts']:,} rollouts per plan.",
            _two_samples("Two-forward", read("law_texts")),
            *fused_lines(),
        )
    )


def fused_lines() -> tuple[str, str]:
    """The same for fused plans."""
    rows = read("law_fused")
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
