"""Exact on tables: the law of what a sampler commits, integrated over its uniforms, against the target's."""

import numpy as np

from blockroll.errors import InvalidInput
from blockroll.samplers.check.finding import Finding
from blockroll.samplers.check.integrate import TokenLaw, committed_law, integrate_step, target_law
from blockroll.samplers.check.tables import Sampler, Tables

TOLERANCE = 1e-12


def check_sampler(
    sampler: Sampler,
    tables: Tables,
    num_drafts: int,
    *,
    num_steps: int = 1,
    length: int | None = None,
    is_coin_shared: bool = False,
    tolerance: float = TOLERANCE,
    name: str = "exact law on tables",
) -> Finding:
    """The law of the first `length` tokens of `num_steps` steps, against the target's law of such texts.

    Exact if the sampler draws by inverse CDF in the order of ids and accepts a draft d by u < target(d) /
    draft(d): its verdict is then constant in every cell of the uniforms that is run. One that decides
    elsewhere shows too, as its law then depends on the corner of a cell that is run, and both the lowest
    and the highest are. Set `is_coin_shared` for one that might use an accept coin for the final token as
    well. Length is by default the most that every path of the steps can be checked on, K + steps tokens.
    Raises InvalidInput for negative counts or broken tables.
    """
    _refuse_counts(num_drafts, num_steps)
    length = num_drafts + num_steps if length is None else length
    expected = target_law(tables, length)
    laws = [
        committed_law(
            sampler, tables, [num_drafts] * num_steps, length, corner=corner, is_coin_shared=is_coin_shared
        )
        for corner in ("low", "high")
    ]
    worst, law = max(((_furthest(law, expected), law) for law in laws), key=lambda pair: pair[0][0])
    difference, tokens = worst
    found = f"the law of {length} tokens is the target's on all {len(expected)} texts"
    if not difference <= tolerance:
        found = (
            f"{tokens} has probability {law.get(tokens, 0.0):.6g}, by the target it is "
            f"{expected.get(tokens, 0.0):.6g}"
        )
    return Finding(
        check=f"{name}, {num_drafts} drafts",
        measure="largest difference of probability",
        statistic=difference,
        threshold=tolerance,
        found=found,
    )


def check_logprobs(
    sampler: Sampler,
    tables: Tables,
    num_drafts: int,
    *,
    tolerance: float = TOLERANCE,
    name: str = "recorded log-probabilities on tables",
) -> Finding:
    """Every `behavior_logprobs` of a committed token against the log of the target's law, in every cell.

    A logprob that is not finite does not pass. Raises InvalidInput as `check_sampler` does.
    """
    _refuse_counts(num_drafts, 1)
    step = integrate_step(sampler, tables, (), num_drafts)
    differences = [
        abs(float(logprob) - float(np.log(tables.target_V(committed[:i])[token])))
        for committed, logprobs_L in zip(step.committed(), step.behavior_logprobs_CL, strict=True)
        for i, (token, logprob) in enumerate(zip(committed, logprobs_L, strict=False))
    ]
    worst = float(np.max(differences))
    verdict = "are" if worst <= tolerance else "are not"
    return Finding(
        check=f"{name}, {num_drafts} drafts",
        measure="largest difference in nats",
        statistic=worst,
        threshold=tolerance,
        found=f"logprobs of {len(differences)} tokens {verdict} those of the law they were drawn from",
    )


def _refuse_counts(num_drafts: int, num_steps: int) -> None:
    if num_drafts < 0 or num_steps < 1:
        raise InvalidInput(
            f"a check needs at least 0 drafts and 1 step, got {num_drafts} and {num_steps}; 0 drafts check "
            "plain sampling"
        )


def _furthest(law: TokenLaw, expected: TokenLaw) -> tuple[float, tuple[int, ...]]:
    """The largest difference of probability, and the text that has it."""
    return max(
        (abs(law.get(tokens, 0.0) - expected.get(tokens, 0.0)), tokens)
        for tokens in law.keys() | expected.keys()
    )
