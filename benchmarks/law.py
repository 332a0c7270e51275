"""The law at full size: greedy equality, exact log-probabilities, two-sample tests against plain."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks.equality import equality
from benchmarks.rows import Row
from benchmarks.workload import (
    TWO_FORWARD,
    K,
    acceptance_rate,
    causal_part,
    decode,
    prompts,
    requests,
    trained_adapter,
)
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.arithmetic import problems, reward
from blockroll.types import PLAIN, Plan, Rollout, Sampling
from tests.equality import assert_same_rollouts

FUSED = (Plan(K, (0,)), Plan(K, (0, K)), Plan(K, (0, 4, K)), Plan(K, tuple(range(K + 1))))


def greedy_equality(policy: HFPolicy, *, count: int = 200, plan: Plan = TWO_FORWARD) -> list[Row]:
    """Greedy drafting against greedy plain, token for token."""
    wanted = requests(prompts(policy, count), Sampling(temperature=0, max_tokens=64))
    plain, drafted = decode(policy, wanted, PLAIN), decode(policy, wanted, plan)
    near_ties = assert_same_rollouts(plain, drafted, policy, at_most=None)
    return [
        {
            "check": f"greedy {plan.name} equals greedy plain",
            "prompts": count,
            "tokens": sum(len(rollout.token_ids) for rollout in plain),
            "differing_rollouts_all_at_ties": len(near_ties),
            "acceptance_rate": acceptance_rate(drafted),
        }
    ]


def logprob_equality(policy: HFPolicy, *, count: int = 1000) -> list[Row]:
    """Recorded policy_logprob against a fresh causal forward of the finished text."""
    wanted = requests(prompts(policy, count), Sampling(max_tokens=64))
    rows = []
    for plan in (PLAIN, TWO_FORWARD):
        differences = [
            difference
            for rollout in decode(policy, wanted, plan)
            for difference in logprob_differences(policy, rollout)
        ]
        rows.append(
            {
                "check": "policy_logprob equals a fresh causal forward",
                "plan": plan.name,
                "rollouts": count,
                "tokens": len(differences),
                "max_difference": max(differences),
                "mean_difference": float(np.mean(differences)),
            }
        )
    return rows


def logprob_differences(policy: HFPolicy, rollout: Rollout) -> list[float]:
    """Absolute difference per token, against transformers' own forward of the whole text."""
    prompt, tokens = rollout.request.prompt_ids, rollout.token_ids
    with torch.no_grad():
        logits = policy.model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0]
    scaled = logits[len(prompt) - 1 : -1].double() / rollout.request.sampling.logprob_temperature
    fresh = scaled.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    return (fresh - torch.tensor(rollout.policy_logprobs, dtype=torch.float64)).abs().tolist()


def law_equality(
    policy: HFPolicy, *, short: int = 20_000, whole: int = 4_000, plan: Plan = TWO_FORWARD
) -> list[Row]:
    """Two-sample tests, drafting against plain: texts of short rollouts, lengths and rewards."""
    # Cut before "=?", and hot: the policy goes on freely, and many of its drafts are rejected.
    short_texts = [text[:-2] for text in prompts(policy, 4, seed=3)]
    rows = []
    sampling = Sampling(max_tokens=4, temperature=1.6)
    repeated = [short_texts[index % len(short_texts)] for index in range(short)]
    samples = [
        Counter(
            (rollout.request.prompt_ids, rollout.token_ids)
            for rollout in decode(policy, requests(repeated, sampling, seed=seed), each)
        )
        for seed, each in ((1, PLAIN), (2, plan))
    ]
    rows.append(
        {"check": "texts of short rollouts agree in law", "rollouts_per_plan": short, **chi_square(*samples)}
    )

    lengths, rewards = [], []
    for seed, each in ((3, PLAIN), (4, plan)):
        # Problems of its own for each plan: two samples that share them would not be independent.
        problem_list = list(itertools.islice(problems(seed, held_out=True), whole))
        texts = prompts(policy, whole, seed=seed)
        rollouts = decode(policy, requests(texts, Sampling(max_tokens=64), seed=seed), each)
        lengths.append(Counter(("all", len(rollout.token_ids)) for rollout in rollouts))
        rewards.append(
            [
                reward(policy.decode(list(rollout.token_ids)), problem.answer)
                for rollout, problem in zip(rollouts, problem_list, strict=True)
            ]
        )
    rows.append({"check": "lengths agree in law", "rollouts_per_plan": whole, **chi_square(*lengths)})
    means = [float(np.mean(column)) for column in rewards]
    error = math.sqrt(sum(mean * (1 - mean) / whole for mean in means))
    rows.append(
        {
            "check": "rewards agree in law",
            "rollouts_per_plan": whole,
            "reward_plain": means[0],
            "reward_two_forward": means[1],
            "p_value": float(2 * stats.norm.sf(abs(means[0] - means[1]) / error)),
            "detectable_difference_at_power_0.99": error
            * float(stats.norm.isf(0.0005) + stats.norm.isf(0.01)),
        }
    )
    return rows


def chi_square(left: Counter[Any], right: Counter[Any], *, fewest: int = 20) -> Row:
    """Homogeneity of two samples of (stratum, value); values seen fewer than `fewest` times are one cell.

    How often a stratum (a prompt) occurs is fixed by design, so each is a table of its own, and statistics
    and degrees of freedom add up. The stated power is against a law whose cells are all off by the same
    relative amount, half up and half down: the total variation that would be found with probability 0.99 at
    significance 0.001.
    """
    statistic, degrees = 0.0, 0
    for stratum in sorted({stratum for stratum, _ in left + right}):
        table = _table(stratum, left, right, fewest)
        if table.shape[1] > 1:
            result = stats.chi2_contingency(table, correction=False)
            statistic, degrees = statistic + float(result.statistic), degrees + int(result.dof)
    critical = stats.chi2.isf(0.001, degrees)
    # Cells off by a share s give noncentrality n s^2 / 2 with n draws a side, and total variation s / 2.
    noncentrality = next(x for x in np.geomspace(1, 1e5, 2000) if stats.ncx2.sf(critical, degrees, x) > 0.99)
    count = min(sum(left.values()), sum(right.values()))
    return {
        "chi_square": statistic,
        "degrees_of_freedom": degrees,
        "p_value": float(stats.chi2.sf(statistic, degrees)),
        "detectable_total_variation_at_power_0.99": math.sqrt(2 * float(noncentrality) / count) / 2,
    }


def _table(stratum: Any, left: Counter[Any], right: Counter[Any], fewest: int) -> np.ndarray:
    """Counts of one stratum, a row per sample and a column per cell."""
    columns, rare = [], np.zeros(2, dtype=int)
    for key in sorted(key for key in left + right if key[0] == stratum):
        column = np.array([left[key], right[key]])
        if column.sum() >= fewest:
            columns.append(column)
        else:
            rare += column
    return np.column_stack([*columns, rare] if rare.sum() >= fewest else columns)


def fused_equality(
    adapter: Path | None = None, *, count: int = 200, short: int = 20_000, whole: int = 4_000
) -> list[Row]:
    """The same for fused plans: greedy token for token, and the law by two-sample tests."""
    policy = causal_part(adapter or trained_adapter())
    rows = [row for plan in FUSED for row in greedy_equality(policy, count=count, plan=plan)]
    plan = Plan(K, (0, 4, K))
    return [
        *rows,
        *({"plan": plan.name, **row} for row in law_equality(policy, short=short, whole=whole, plan=plan)),
    ]


def experiments() -> dict[str, Callable[[], list[Row]]]:
    """Every experiment by the name of its result file."""
    policy = HFPolicy.from_pretrained("tiny")
    return {
        "greedy": partial(greedy_equality, policy),
        "logprobs": partial(logprob_equality, policy),
        "texts": partial(law_equality, policy),
        "fused": fused_equality,
        "equality": equality,
    }
