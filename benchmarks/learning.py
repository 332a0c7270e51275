"""GRPO on rollouts of several plans and laws."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.rows import Row
from benchmarks.workload import (
    LEARNING_TEMPERATURE,
    RUNS,
    K,
    decode,
    has_checkpoint,
    mean_reward,
    prompts,
    requests,
    resumable,
    trained_adapter,
)
from blockroll.config import PolicyConfig, RolloutConfig, RunConfig, TrainConfig
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.checkpoint import latest_checkpoint
from blockroll.rl_loops.loop import train
from blockroll.types import PLAIN, Sampling

# A planner drafts where drafting pays: with 16 places on a CPU it does, with 128 it hardly ever does.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"plan": "plain"},
    "lossless": {"plan": "auto", "max_batch_size": 16},
    "mixed, corrected": {"plan": f"two_forward({K})", "mix_weight": 0.5},
    "mixed, uncorrected": {"plan": f"two_forward({K})", "mix_weight": 0.5},
}


def by_plan(
    *,
    seeds: Sequence[int] = (3, 4, 5),
    plans: Sequence[str] = ("plain", "two_forward"),
    stages: Sequence[int] = (45, 75, 105, 135),
    prompts_per_step: int = 64,
) -> list[Row]:
    """GRPO from the shipped policy, plain and two-forward, several seeds; a row per step.

    Each stage ends at a step where the learning rate has fallen to 0, and the next goes on from its
    checkpoint: a warm restart. Drawn hotter than 1, where the policy makes more of the mistakes that it can
    unlearn. Seeds 0 to 2 served to choose these settings, so the runs have others. In one process with one
    thread, so that runs can go on side by side.
    """
    rows = []
    for seed, plan in itertools.product(seeds, plans):
        config = RunConfig(
            name=f"{plan}_{seed}",
            runs_dir=str(RUNS / "plans"),
            seed=seed,
            policy=PolicyConfig(),
            rollout=RolloutConfig(
                backend="local",
                num_replicas=1,
                max_batch_size=128,
                plan=plan,
                temperature=LEARNING_TEMPERATURE,
            ),
            train=TrainConfig(
                prompts_per_step=prompts_per_step,
                learner_threads=1,
                eval_every=15,
                eval_prompts=256,
            ),
        )
        for steps in stages:
            stage = replace(config, train=replace(config.train, steps=steps))
            result = train(resumable(stage), resume=has_checkpoint(config.run_dir))
        about = {
            "seed": seed,
            "plan_config": plan,
            "temperature": LEARNING_TEMPERATURE,
            "stages": list(stages),
        }
        rows += [{**about, **metrics} for metrics in result.metrics]
    return rows


def by_law(
    adapter: Path | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    variants: Sequence[str] = tuple(VARIANTS),
    steps: int = 45,
    prompts_per_step: int = 64,
    held_out: int = 2_000,
    eval_prompts: int = 256,
) -> list[Row]:
    """GRPO under plain, lossless and mixed rollouts, the last with and without correction.

    A row per step, and one per run: what its last weights get on held-out problems, decoded plainly at
    temperature 1, whatever law they were trained under.
    """
    adapter = adapter or trained_adapter()
    rows = []
    for seed, variant in itertools.product(seeds, variants):
        config = RunConfig(
            name=f"{variant.replace(', ', '_')}_{seed}",
            runs_dir=str(RUNS / "laws"),
            seed=seed,
            policy=PolicyConfig(adapter=str(adapter)),
            rollout=RolloutConfig(
                backend="local",
                num_replicas=1,
                temperature=LEARNING_TEMPERATURE,
                **{"max_batch_size": 128, **VARIANTS[variant]},
            ),
            train=TrainConfig(
                steps=steps,
                prompts_per_step=prompts_per_step,
                importance_sampling_correction=variant != "mixed, uncorrected",
                learner_threads=1,
                eval_every=15,
                eval_prompts=eval_prompts,
            ),
        )
        result = train(resumable(config), resume=has_checkpoint(config.run_dir))
        rows += [{"seed": seed, "variant": variant, **metrics} for metrics in result.metrics]
        policy = HFPolicy.from_pretrained(latest_checkpoint(config.run_dir))
        rollouts = decode(policy, requests(prompts(policy, held_out), Sampling(max_tokens=64)), PLAIN)
        rows.append(
            {
                "seed": seed,
                "variant": variant,
                "held_out_problems": held_out,
                "held_out_reward": mean_reward(policy, rollouts),
            }
        )
    return rows


def experiments() -> dict[str, Callable[[], list[Row]]]:
    """Every experiment by the name of its result file."""
    return {"plans": by_plan, "laws": by_law}
