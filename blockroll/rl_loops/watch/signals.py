"""What a batch of rollouts says about itself, as metrics: names and meanings are those of docs/metrics.md.

Most are ratios of two sums, which several processes can add up before they divide; those of steps follow from
counts of request-steps alone (`RolloutStats.steps`), which can be added up as well.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from blockroll.rl_loops.advantages import FAILED_REASONS
from blockroll.rl_loops.watch.repetition import MOST_REPEATED, repeated_shares
from blockroll.rollout.planning.acceptance import AcceptanceByPosition
from blockroll.types import RequestStep, Rollout, counted

MOST_SOURCES = 32  # of a batch: more are no sources but something else
_PERPLEXITY = "rollout/perplexity_"
_LARGEST_LOG = 700.0  # whose exponential is a float64

Rates = Mapping[str, tuple[float, float]]  # numerator and denominator


def step_metrics(
    rollouts: Sequence[Rollout],
    rows: Sequence[Mapping[str, Any]],
    rewards: Sequence[float],
    *,
    version: int,
    duration_s: float,
) -> dict[str, float]:
    """Of a training step with the weights of `version`. `rows` and `rewards` (NaN: none) are by rollout."""
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    ended = [len(rollout.token_ids) for rollout in rollouts if rollout.finish_reason == "stop"]
    valid = [reward for reward in rewards if math.isfinite(reward)]
    return {
        "reward": _ratio(math.fsum(valid), len(valid)),
        **values_of(rollout_rates(rollouts, duration_s)),
        "rollout/duration_s": duration_s,
        "rollout/failed": float(sum(rollout.finish_reason in FAILED_REASONS for rollout in rollouts)),
        "completions/min_length": float(min(lengths, default=0)),
        "completions/max_length": float(max(lengths, default=0)),
        "completions/min_terminated_length": float(min(ended, default=math.nan)),
        "completions/max_terminated_length": float(max(ended, default=math.nan)),
        **count_metrics(counted(rollout.stats.steps for rollout in rollouts)),
        **reward_metrics(rewards, [source_of(row) for row in rows]),
        **staleness_metrics(rollouts, version),
    }


def acceptance_rate(rollouts: Sequence[Rollout]) -> float:
    """Accepted drafts per draft submitted to verify; NaN under the plain plan."""
    return _ratio(sum(r.stats.num_accepted for r in rollouts), sum(r.stats.num_drafted for r in rollouts))


def rollout_rates(rollouts: Sequence[Rollout], duration_s: float) -> dict[str, tuple[float, float]]:
    """Metrics as numerator and denominator, the same ones for all rollouts. `values_of` divides."""
    num_tokens, num_rollouts = sum(len(rollout.token_ids) for rollout in rollouts), len(rollouts)
    accept_lengths = [
        1 + rollout.stats.num_accepted / rollout.stats.num_verify_steps
        for rollout in rollouts
        if rollout.stats.num_verify_steps
    ]
    num_shortages = sum(rollout.stats.num_shortages for rollout in rollouts)
    num_steps = sum(count for rollout in rollouts for _, count in rollout.stats.steps)
    speedups = [rollout.stats.speedups for rollout in rollouts if rollout.stats.speedups is not None]
    effective = [rollout.effective_sample_size for rollout in rollouts if rollout.token_ids]
    ended = [len(rollout.token_ids) for rollout in rollouts if rollout.finish_reason == "stop"]
    repeated_B = repeated_shares([rollout.token_ids for rollout in rollouts])
    return {
        "rollout/tokens_per_forward": (num_tokens, sum(rollout.stats.num_forwards for rollout in rollouts)),
        "rollout/spec_accept_length": (sum(accept_lengths), len(accept_lengths)),
        "rollout/generated_tok_s": (num_tokens, duration_s),
        "rollout/speedup_predicted": (sum(predicted for predicted, _ in speedups), len(speedups)),
        "rollout/speedup_achieved": (sum(achieved for _, achieved in speedups), len(speedups)),
        "rollout/prefix_hit_rate": (
            sum(rollout.stats.num_reused for rollout in rollouts),
            sum(rollout.stats.num_prefilled + rollout.stats.num_reused for rollout in rollouts),
        ),
        "rollout/preempted": (sum(rollout.stats.num_preempted for rollout in rollouts), num_rollouts),
        "rollout/shortage_rate": (num_shortages, num_shortages + num_steps),
        "rollout/log_ratio_mean": (sum(rollout.log_ratio for rollout in rollouts), num_rollouts),
        "rollout/effective_sample_size": (sum(effective), len(effective)),
        f"{_PERPLEXITY}policy": _surprisal([rollout.policy_logprobs for rollout in rollouts]),
        f"{_PERPLEXITY}behavior": _surprisal([rollout.behavior_logprobs for rollout in rollouts]),
        "rollout/repetition_mean": (float(repeated_B.sum()), num_rollouts),
        "rollout/repetition_share": (float((repeated_B > MOST_REPEATED).sum()), num_rollouts),
        "completions/mean_length": (num_tokens, num_rollouts),
        "completions/mean_terminated_length": (sum(ended), len(ended)),
        "completions/clipped_ratio": (
            sum(rollout.finish_reason == "length" for rollout in rollouts),
            num_rollouts,
        ),
    }


def values_of(rates: Rates) -> dict[str, float]:
    """Each metric of its two sums; NaN where the second one is 0."""
    ratios = {name: _ratio(*rate) for name, rate in rates.items()}
    return {name: _exp(each) if name.startswith(_PERPLEXITY) else each for name, each in ratios.items()}


def known(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those that have a value."""
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def count_metrics(counts: Mapping[RequestStep, int]) -> dict[str, float]:
    """Of request-steps by what they did: plans, acceptance from all sides, what committed tokens are.

    Acceptance that has no value is NaN; its families have members for what occurred.
    """
    plans: Counter[str] = Counter()
    drafts = {name: [0, 0] for name in ("rollout/acceptance_rate",)}
    num_tokens = num_recovered = num_extra = 0
    for step, count in counts.items():
        plans[step.plan.name] += count
        num_tokens += count * step.num_kept
        num_recovered += count * step.num_recovered
        num_extra += count * step.num_extra
        if step.num_drafts:
            names = ["rollout/acceptance_rate", f"rollout/acceptance_rate/{step.plan.drafter}"]
            if step.level is not None:
                names.append(f"rollout/acceptance_rate_level_{step.level}")
            for name in names:
                sums = drafts.setdefault(name, [0, 0])
                sums[0] += count * step.num_accepted
                sums[1] += count * step.num_drafts
    acceptance = AcceptanceByPosition(counts)
    shares = acceptance.length_shares
    longest = max((length for length, share in enumerate(shares) if share), default=-1)
    return {
        **{f"rollout/plan/{name}": count / plans.total() for name, count in plans.items()},
        **{name: _ratio(*sums) for name, sums in drafts.items()},
        **{
            f"rollout/spec_accept_rate_pos_{position}": rate
            for position, rate in enumerate(acceptance.conditional, start=1)
            if rate is not None
        },
        **{f"rollout/spec_accept_length_share_{n}": shares[n] for n in range(longest + 1)},
        "rollout/recovered_share": _ratio(num_recovered, num_tokens),
        "rollout/extra_share": _ratio(num_extra, num_tokens),
    }


def reward_metrics(rewards: Sequence[float], sources: Sequence[str | None]) -> dict[str, float]:
    """The least and the largest reward, and the mean of each source, of those that are finite."""
    valid = [(reward, name) for reward, name in zip(rewards, sources, strict=True) if math.isfinite(reward)]
    by_source: dict[str, list[float]] = {}
    for reward, name in valid:
        if name is not None:
            by_source.setdefault(name, []).append(reward)
    if len(by_source) > MOST_SOURCES:
        by_source = {}
    return {
        "reward/min": min((reward for reward, _ in valid), default=math.nan),
        "reward/max": max((reward for reward, _ in valid), default=math.nan),
        **{f"reward/by_source/{name}": _ratio(sum(each), len(each)) for name, each in by_source.items()},
    }


def source_of(row: Mapping[str, Any]) -> str | None:
    """Where a row comes from, as its column `source` or `data_source` says; None: neither holds text."""
    named = (row.get(column) for column in ("source", "data_source"))
    return next((name for name in named if isinstance(name, str) and name), None)


def staleness_metrics(rollouts: Sequence[Rollout], version: int) -> dict[str, float]:
    """How many versions behind `version` the tokens of a rollout were drawn; verl's names and meanings."""
    spread = [(min(each.policy_versions), max(each.policy_versions)) for each in rollouts if each.token_ids]
    columns = {
        "trajectory_spans": [newest - oldest + 1 for oldest, newest in spread],
        "trajectory_staleness": [version - newest for _, newest in spread],
        "trajectory_staleness_worst": [version - oldest for oldest, _ in spread],
    }
    metrics = {}
    for name, values in columns.items():
        metrics[f"training/off_policy/{name}/mean"] = _ratio(sum(values), len(values))
        metrics[f"training/off_policy/{name}/max"] = float(max(values, default=math.nan))
        metrics[f"training/off_policy/{name}/min"] = float(min(values, default=math.nan))
    return metrics


def _surprisal(columns: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Minus the sum of all finite log-probabilities, and their number."""
    logprobs_N = np.fromiter(chain.from_iterable(columns), dtype=np.float64)
    finite_N = logprobs_N[np.isfinite(logprobs_N)]
    return -float(finite_N.sum()), len(finite_N)


def _exp(logarithm: float) -> float:
    return math.exp(logarithm) if not logarithm > _LARGEST_LOG else math.inf


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
