"""TRL's trainer and ours, drafts that follow the policy, and a real model under GRPO."""

import itertools
import random
import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from benchmarks.grpo import grpo
from benchmarks.rows import Row
from benchmarks.trl_timing import GENERATE_S, OURS, STOCK, medians, train, train_in_turn
from benchmarks.workload import (
    LEARNING_TEMPERATURE,
    RUNS,
    SMOLLM2,
    K,
    causal_part,
    converted,
    has_smollm2,
    trained_adapter,
)
from blockroll.config import AlignmentConfig, ConvertConfig, DraftConfig, RolloutConfig
from blockroll.rl_loops.convert import METRICS_FILE, STATE_FILE
from blockroll.rl_loops.tracking import read_lines
from blockroll.rl_loops.trl.metrics import SURPRISAL

SEEDS = (0, 1, 2)
CURVES = ("reward", "rollout/acceptance_rate", "kl", "draft/acceptance")


STOCK_NAME, OURS_NAME, UNCORRECTED = "trl", "blockroll", "blockroll, correction off"
SUBJECTS: dict[str, dict[str, Any]] = {
    STOCK_NAME: {"cls": STOCK},
    OURS_NAME: {"cls": OURS, "rollout": RolloutConfig(plan="two_forward")},
    UNCORRECTED: {
        "cls": OURS,
        "rollout": RolloutConfig(plan="two_forward"),
        "arguments": {"vllm_importance_sampling_correction": False},
    },
}


def drafting_policy(
    out: Path = RUNS / "drafting", *, max_tokens: int = 300_000, prompts_per_round: int = 512
) -> Path:
    """The shipped policy after `convert` has taught it to draft better."""
    config = ConvertConfig(
        out=str(out),
        max_tokens=max_tokens,
        prompts_per_round=prompts_per_round,
        completion_tokens=64,
        steps_per_round=8,
        epochs_per_round=6,
        max_batch_size=128,
        patience=1000,
        draft=DraftConfig(conversion="full", block_sizes=(8,), layouts=("two_forward",), loss="tv"),
    )
    return converted(config)


def conversion(policy: Path) -> Row:
    """What it took and gave: expected tokens of a step on fresh answers in its first and last round, and
    the KL from the shipped policy, nats per token."""
    progress = torch.load(policy / STATE_FILE, map_location="cpu", weights_only=True)["progress"]
    (kind,) = {name for name in progress["scores"][0] if " position " not in name}
    tokens_per_step = [scores[kind] for scores in progress["scores"]]
    last = [row for row in read_lines(policy / METRICS_FILE) if row["round"] == progress["round"]]
    return {
        "minutes": progress["minutes"],
        "tokens": progress["num_tokens"],
        "tokens_per_step": [tokens_per_step[0], tokens_per_step[-1]],
        "policy_kl": statistics.mean(row["policy_kl"] for row in last),
    }


def stock(
    policy: Path | None = None,
    *,
    bf16: bool = False,
    batches: Sequence[int] = (2, 8, 32),
    seeds: Sequence[int] = SEEDS,
    steps: int = 60,
) -> list[Row]:
    """TRL's own trainer and ours with equal seeds and prompts, a step of each in turn.

    In float32, or with `bf16` in TRL's default precision, on the tiny policy as `convert` has taught it to
    draft. Learning is compared at the largest batch, times at all of them. Lossless rollouts need no
    correction: with it off, TRL leaves out the forward that computes its ratios.
    """
    policy = policy or drafting_policy()
    rows: list[Row] = []
    for batch, seed in itertools.product(batches, seeds):
        names = list(SUBJECTS)[seed % 3 :] + list(SUBJECTS)[: seed % 3]  # each comes first once
        common = {
            "model": str(policy),
            "seed": seed,
            "steps": steps,
            "batch": batch,
            "group": min(8, batch),
            "bf16": bf16,
        }
        runs = train_in_turn({name: partial(train_subject, name, **common) for name in names})
        times = {name: medians(run, GENERATE_S, "step_time") for name, run in runs.items()}
        ours = runs[OURS_NAME]
        rows.append(
            {
                "batch": batch,
                "seed": seed,
                "bf16": bf16,
                "steps": steps,
                "threads": torch.get_num_threads(),
                "conversion": conversion(policy),
                "generate_ratio": times[OURS_NAME][GENERATE_S] / times[STOCK_NAME][GENERATE_S],
                "step_ratio": times[OURS_NAME]["step_time"] / times[STOCK_NAME]["step_time"],
                "step_ratio_uncorrected": times[UNCORRECTED]["step_time"] / times[STOCK_NAME]["step_time"],
                "reward": {name: [row["reward"] for row in run] for name, run in runs.items()},
                "importance_ratio": [row["sampling/importance_sampling_ratio/mean"] for row in ours],
                "surprisal_mean": ours[-1][f"{SURPRISAL}/run_mean"],
                "surprisal_se": ours[-1][f"{SURPRISAL}/run_se"],
                "acceptance": [row["rollout/acceptance_rate"] for row in ours],
            }
        )
    return rows


def train_subject(name: str, callback: TrainerCallback, *, bf16: bool, **options: Any) -> list[Row]:
    """A run of one of them, in a process of its own."""
    subject = SUBJECTS[name]
    arguments = {**subject.get("arguments", {}), "bf16": bf16}
    return train(**{**subject, "arguments": arguments}, **options, callbacks=[callback])


def alignment(
    adapter: Path | None = None, *, seeds: Sequence[int] = SEEDS, steps: int = 80, batch: int = 64
) -> list[Row]:
    """GRPO of the tiny policy's causal part with an adapter, left alone or aligned after every update."""
    policy, adapter = RUNS / "policy", adapter or trained_adapter()
    causal_part().save_pretrained(policy)
    rows: list[Row] = []
    for seed, is_aligned in itertools.product(seeds, (False, True)):
        run = run_of_tiny(
            policy, adapter, seed, is_aligned=is_aligned, steps=steps, batch=batch, learning_rate=1e-4
        )
        rows.append(
            {
                "seed": seed,
                "is_aligned": is_aligned,
                "steps": steps,
                **{name: [row.get(name) for row in run] for name in CURVES},
            }
        )
    return rows


def run_of_tiny(
    policy: Path,
    adapter: Path,
    seed: int,
    *,
    is_aligned: bool,
    steps: int,
    batch: int,
    learning_rate: float,
    mix_weight: float = 1.0,
    **arguments: Any,
) -> list[Row]:
    """What GRPO of the tiny policy logs, with drafts aligned after every update or left alone."""
    draft = DraftConfig(block_sizes=(K,), layouts=("two_forward",), learning_rate=1e-3)
    # A KL weight too small to matter, for TRL to report the distance from the first policy.
    common = {"beta": 1e-9, "temperature": LEARNING_TEMPERATURE, "learning_rate": learning_rate}
    rows: list[Row] = train(
        OURS,
        seed=seed,
        steps=steps,
        batch=batch,
        model=str(policy),
        adapter=adapter,
        rollout=RolloutConfig(plan=f"two_forward({K})", mix_weight=mix_weight),
        alignment=AlignmentConfig(draft=draft) if is_aligned else None,
        arguments={**common, **arguments},
    )
    return rows


def smollm2(
    *, steps: int = 20, batch: int = 16, plans: Sequence[str] = ("plain", "auto", "two_forward(4)")
) -> list[Row]:
    """GRPO of SmolLM2-135M-Instruct on one-digit sums through TRL: rollouts by `auto`, drafted, and plain."""
    rows: list[Row] = []
    for plan in plans:
        run = train(
            OURS,
            seed=0,
            steps=steps,
            batch=batch,
            model=str(SMOLLM2 / "policy"),
            adapter=SMOLLM2 / "adapter",
            dataset=one_digit_sums(0, steps * batch),
            reward=is_right_sum,
            rollout=RolloutConfig(plan=plan),
            arguments={"max_completion_length": 24, "learning_rate": 1e-5},
        )
        rows.append(
            {
                "plan": plan,
                "batch": batch,
                "steps": steps,
                "reward": [row["reward"] for row in run],
                "acceptance": [row.get("rollout/acceptance_rate") for row in run],
                "tokens_per_forward": [row["rollout/tokens_per_forward"] for row in run],
                "generate_s": [row[GENERATE_S] for row in run],
                "step_s": [row["step_time"] for row in run],
            }
        )
    return rows


def one_digit_sums(seed: int, count: int) -> Dataset:
    """Questions as a chat, with their answers."""
    rng = random.Random(f"sums-{seed}")
    pairs = [(rng.randint(0, 9), rng.randint(0, 9)) for _ in range(count)]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"What is {a} + {b}? Answer with the number only."}],
                "answer": a + b,
            }
            for a, b in pairs
        ]
    )


def is_right_sum(completions: list[Any], answer: list[int], **_: object) -> list[float]:
    """1 if the last number of the reply is the sum."""
    replies = [completion[0]["content"] for completion in completions]
    numbers = [re.findall(r"\d+", reply) for reply in replies]
    return [
        float(bool(found) and int(found[-1]) == right) for found, right in zip(numbers, answer, strict=True)
    ]


def experiments() -> dict[str, Callable[[], list[Row]]]:
    """Every experiment by the name of its result file."""
    found: dict[str, Callable[[], list[Row]]] = {
        "stock": stock,
        "stock_bf16": partial(stock, bf16=True),
        "alignment": alignment,
    }
    if has_smollm2("trl", "smollm2"):
        found["smollm2"] = smollm2
    if (SMOLLM2 / "policy" / "config.json").is_file():
        found["grpo"] = grpo
    else:
        print(f"trl: grpo is left out: no {SMOLLM2 / 'policy'}; run examples/smollm2.py first")
    return found
