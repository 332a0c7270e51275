"""Speed against plain decoding and transformers, in one run, on one thread."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.rows import Row
from benchmarks.workload import (
    RUNS,
    SMOLLM2,
    TWO_FORWARD,
    K,
    causal_part,
    one_thread,
    prompts,
    trained_adapter,
)
from blockroll.bench.bench import PEERS_PYTHON, BenchOptions, run_bench, to_record
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.planning.planner import read_plan
from blockroll.types import PLAIN, Plan

HISTORY_DRAFTS = 5  # as many as vLLM's n-gram speculation drafts


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


def against_peers(
    folder: str | Path = SMOLLM2 / "policy",
    texts: Sequence[tuple[int, ...]] = (),
    *,
    batches: tuple[int, ...] = (1, 8, 32),
    repeats: int = 5,
    max_tokens: int = 48,
    dtype: str = "bfloat16",
    against: tuple[str, ...] = ("generate", "vllm", "vllm_ngram"),
) -> list[Row]:
    """A real pretrained model beside transformers and vLLM, in turns; every text has `max_tokens` tokens.

    `texts` are its prompts, as tokens; none: the held-out questions of examples/smollm2.py.
    """
    from examples.smollm2 import HELD_OUT_TOPICS, prompt_ids, questions

    with one_thread():
        policy = HFPolicy.from_pretrained(folder, dtype=dtype)
        options = BenchOptions(
            batches=batches, repeats=repeats, rollouts=1, max_tokens=(max_tokens,), ignore_eos=True
        )
        rows = run_bench(
            policy,
            texts or prompt_ids(policy, list(questions(HELD_OUT_TOPICS))),
            [PLAIN, read_plan(f"history({HISTORY_DRAFTS})", policy)],
            options,
            policy_path=str(folder),
            against=against,
        )
    return [to_record(row) for row in rows]


def experiments() -> dict[str, Callable[[], list[Row]]]:
    """Every experiment by the name of its result file."""
    found = {"drafts": partial(drafted_speed, HFPolicy.from_pretrained("tiny")), "auto": auto}
    if not (SMOLLM2 / "policy" / "config.json").is_file():
        print(f"speed: peers is left out: no {SMOLLM2 / 'policy'}; run examples/smollm2.py first")
    elif not PEERS_PYTHON.is_file():
        print(f"speed: peers is left out: no {PEERS_PYTHON}; run `make peers` first")
    else:
        found["peers"] = against_peers
    return found
