"""Speed against plain decoding and transformers, in one run, on one thread."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import peers
from benchmarks.rows import Row
from benchmarks.workload import (
    RUNS,
    TWO_FORWARD,
    K,
    causal_part,
    one_thread,
    prompts,
    trained_adapter,
)
from blockroll.bench.bench import BenchOptions, run_bench, to_record
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.planning.planner import read_plan
from blockroll.types import PLAIN, Plan


def drafted_speed(
    policy: HFPolicy, *, batches: tuple[int, ...] = (1, 4, 16, 64), repeats: int = 7
) -> list[Row]:
    """Plain, two-forward and transformers' generate, alternating in one run; one thread."""
    with one_thread():
        options = BenchOptions(batches=batches, repeats=repeats, rollouts=16, max_tokens=(64,))
        rows = run_bench(
            policy,
            prompts(policy, 128, seed=7),
            [PLAIN, TWO_FORWARD],
            options,
            policy_path="tiny",
            against=("generate",),
        )
    return [to_record(row) for row in rows]


def auto(
    adapter: Path | None = None,
    *,
    batches: tuple[int, ...] = (1, 4, 16, 64),
    repeats: int = 7,
    rollouts: int = 32,
) -> list[Row]:
    """The plan that chooses itself, against plain and transformers, in one run; one thread.

    Four rollouts for each place in the batch are submitted together, as a step of RL submits many. A first,
    shorter run fills the cost table, as any earlier run on a user's machine does.
    """
    os.environ["BLOCKROLL_CACHE"] = str(RUNS / "cache")
    with one_thread():
        policy = causal_part(adapter or trained_adapter())
        texts = prompts(policy, 128, seed=7)
        for rounds in (min(2, repeats), repeats):
            options = BenchOptions(
                batches=batches, repeats=rounds, rollouts=rollouts, queue=4, max_tokens=(64,)
            )
            rows = run_bench(
                policy,
                texts,
                [PLAIN, Plan(K), Plan(K, (0, K)), read_plan("auto", policy)],
                options,
                policy_path="tiny",
                against=("generate",),
            )
    return [to_record(row) for row in rows]


def experiments() -> dict[str, Callable[[], list[Row]]]:
    """Every experiment by the name of its result file."""
    found = {"drafts": partial(drafted_speed, HFPolicy.from_pretrained("tiny")), "auto": auto}
    if (reason := peers.missing()) is not None:
        print(f"speed: peers is left out: {reason}")
    else:
        found["peers"] = peers.peers
    return found
