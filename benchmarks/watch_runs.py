"""Whole runs with a guard: silent ones, harmed ones with and without it, and what watching costs.

    python -m benchmarks.evidence watch silent harm cost

Rows of a run are those of its metrics. One thread; runs go on from their checkpoints.
"""

import io
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.rows import Row
from benchmarks.turns import steps_in_turn
from benchmarks.workload import (
    LEARNING_TEMPERATURE,
    RUNS,
    TWO_FORWARD,
    K,
    has_checkpoint,
    one_thread,
    prompts,
    requests,
    resumable,
    trained_adapter,
)
from blockroll.config import PolicyConfig, RolloutConfig, RunConfig, TrainConfig, WatchConfig
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.loop import train
from blockroll.rl_loops.watch.watch import WATCH_EVERY, Watch
from blockroll.rollout.calibration.observer import Calibration
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.trace import Watcher
from blockroll.types import PLAIN, Plan, Sampling


def silent(
    *, seeds: Sequence[int] = tuple(range(20)), steps: int = 8, prompts_per_step: int = 8
) -> list[Row]:
    """Lossless runs of the shipped policy by `auto`: what every test has come to at their ends."""
    rows = []
    for seed in seeds:
        config = run_config("silent", seed, RUNS / "watch", steps=steps, prompts_per_step=prompts_per_step)
        result = train(resumable(config), resume=has_checkpoint(config.run_dir), console=quiet())
        last = result.metrics[-1]
        rows.append(
            {
                "seed": seed,
                "steps": steps,
                "said": [row["guard/said"] for row in result.metrics if row["guard/said"]],
                **{name: value for name, value in last.items() if name.startswith("drift/")},
            }
        )
    return rows


MIX_WEIGHT = 0.25  # of a law that earns about 0.1 less here than the policy itself
SHADOW_SHARE = 0.5
HARM_ARMS = {
    "mixed": WatchConfig(),
    "mixed, guarded": WatchConfig(reward="lossless", shadow_share=SHADOW_SHARE),
    "lossless": WatchConfig(),
}


def harm(
    adapter: Path | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 30,
    prompts_per_step: int = 32,
    eval_prompts: int = 256,
) -> list[Row]:
    """GRPO on rollouts of a mixed law that earns less and is not corrected: with and without the guard."""
    adapter = adapter or trained_adapter()
    rows = []
    for seed, (arm, watch) in itertools.product(seeds, HARM_ARMS.items()):
        config = run_config(
            f"harm_{arm.replace(', ', '_')}",
            seed,
            RUNS / "watch",
            steps=steps,
            prompts_per_step=prompts_per_step,
            adapter=adapter,
            mix_weight=1.0 if arm == "lossless" else MIX_WEIGHT,
            plan=f"two_forward({K})",
            watch=watch,
            eval_every=5,
            eval_prompts=eval_prompts,
            importance_sampling_correction=False,
        )
        result = train(resumable(config), resume=has_checkpoint(config.run_dir), console=quiet())
        about = {"seed": seed, "arm": arm, "mix_weight": MIX_WEIGHT, "shadow_share": SHADOW_SHARE}
        rows += [{**about, **metrics} for metrics in result.metrics]
    return rows


def cost(*, batch: int = 64, repeats: int = 9, max_tokens: int = 128) -> list[Row]:
    """What looking costs: steps of an engine that is watched over those of one that is not, in turn.

    A pair that nobody watches shows how far the machine alone moves such a ratio. And the tests of a step.
    """
    policy = HFPolicy.from_pretrained("tiny")
    with one_thread():
        rows = [_watching_cost(policy, plan, batch, repeats, max_tokens) for plan in (PLAIN, TWO_FORWARD)]
        return [*rows, _tests_cost(policy, batch)]


def _watching_cost(policy: HFPolicy, plan: Plan, batch: int, repeats: int, max_tokens: int) -> Row:
    def ratio(repeat: int, second: Sequence[Watcher]) -> float:
        sampling = Sampling(max_tokens=max_tokens, min_tokens=max_tokens)
        asked = requests(prompts(policy, batch, seed=repeat), sampling, seed=repeat)
        engines = [
            Engine(policy, plan=plan, max_batch_size=batch, max_length=256, observers=observers)
            for observers in ((), second)
        ]
        return steps_in_turn(engines, asked)

    ratio(0, ())
    watched = [ratio(each, [Watcher(Calibration(), every=WATCH_EVERY)]) for each in range(1, repeats + 1)]
    alone = [ratio(each, ()) for each in range(1, repeats + 1)]
    return {
        "what": f"decoding, one step in {WATCH_EVERY} looked at",
        "plan": plan.name,
        "batch": batch,
        "repeats": repeats,
        "over_unwatched": statistics.median(watched),
        "range": [min(watched), max(watched)],
        "band": [min(alone), max(alone)],
    }


def _tests_cost(policy: HFPolicy, batch: int) -> Row:
    """The guard's own part of a training step, over the time to draw what it is told of."""
    texts = prompts(policy, batch, seed=0)
    engine = Engine(policy, plan=PLAIN, max_batch_size=batch)
    engine.submit(requests(texts, Sampling(max_tokens=64), seed=0))
    start, finished = time.perf_counter(), []
    while engine.num_requests:
        finished += engine.step().finished
    drawing_s = time.perf_counter() - start
    logprobs_N = np.array([value for rollout in finished for value in rollout.policy_logprobs])
    taken = []
    for _ in range(20):
        watch, start = Watch(WatchConfig()), time.perf_counter()
        watch.observe_rollouts(finished)
        watch.observe_laws(finished, logprobs_N)
        watch.decide(1)
        taken.append(time.perf_counter() - start)
    return {
        "what": "tests of a training step, over the time to draw its rollouts",
        "plan": "plain",
        "batch": batch,
        "repeats": len(taken),
        "over_drawing": statistics.median(taken) / drawing_s,
        "range": [min(taken) / drawing_s, max(taken) / drawing_s],
    }


def run_config(
    name: str,
    seed: int,
    runs_dir: Path,
    *,
    steps: int,
    prompts_per_step: int,
    adapter: Path | None = None,
    mix_weight: float = 1.0,
    plan: str = "auto",
    watch: WatchConfig | None = None,
    **options: Any,
) -> RunConfig:
    return RunConfig(
        name=f"{name}_{seed}",
        runs_dir=str(runs_dir),
        seed=seed,
        policy=PolicyConfig(adapter=None if adapter is None else str(adapter)),
        rollout=RolloutConfig(
            backend="local",
            num_replicas=1,
            max_batch_size=64,
            plan=plan,
            mix_weight=mix_weight,
            temperature=LEARNING_TEMPERATURE,
        ),
        train=TrainConfig(
            **{
                "steps": steps,
                "prompts_per_step": prompts_per_step,
                "learner_threads": 1,
                "eval_every": 0,
                "checkpoint_every": 1 if name == "stale" else 5,
                **options,
            }
        ),
        watch=watch or WatchConfig(),
    )


def quiet() -> Console:
    return Console(file=io.StringIO())
