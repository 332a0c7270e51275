"""GRPO of a real model on worked sums: TRL's trainer, ours in its place, and our loop, in turns.

    python -m benchmarks.evidence trl grpo

SmolLM2 (`examples/smollm2.py` says how to get it), a prompt that comes again every step, 8 siblings of
it. Ours decode plainly and by `auto`, each beside TRL's own. Each run has a process of its own, and one at
a time takes a step (benchmarks/trl_timing.py), so ratios are of the same minutes of the machine.
"""

import random
import re
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

from benchmarks.cells import measured
from benchmarks.rows import Row
from benchmarks.trl_timing import GENERATE_S, OURS, STOCK, train, train_in_turn
from benchmarks.workload import RUNS, SMOLLM2, working_dtype
from blockroll.bench.prompts import worked_text, worked_turns
from blockroll.config import PolicyConfig, RolloutConfig, RunConfig, TrainConfig
from blockroll.rl_loops import loop
from blockroll.rl_loops.tasks import from_rows

TRL, OUR_TRAINER, OUR_LOOP = "TRL's trainer", "ours in TRL", "our loop"
ARMS = (
    (TRL, "generate"),
    (OUR_TRAINER, "plain"),
    (OUR_TRAINER, "auto"),
    (OUR_LOOP, "plain"),
    (OUR_LOOP, "auto"),
)
SIBLINGS = 8
PROMPTS_PER_STEP = 1
NUM_PROMPTS = 1  # every step asks them all again
LEARNING_RATE = 2e-5
ANSWER = re.compile(r"[Tt]he answer is (\d{1,6})")


def problems(seed: int, path: str) -> list[Row]:
    """The prompts of a run, sums behind one that is worked out, and their answers.

    They are turns of a conversation where the checkpoint brings a chat template, else text.
    """
    draw = random.Random(f"grpo-{seed}")
    write = worked_turns if (Path(path) / "chat_template.jinja").is_file() else worked_text
    drawn = [[_sum(draw) for _ in range(2)] for _ in range(NUM_PROMPTS)]
    return [{"prompt": write(sums), "answer": sum(sums[-1])} for sums in drawn]


def _sum(draw: random.Random) -> tuple[int, int, int]:
    return draw.randint(1, 9), draw.randint(1, 9), draw.randint(1, 9)


def closeness(
    completions: Sequence[str | list[dict[str, str]]], answer: Sequence[int], **_: object
) -> list[float]:
    """1 / (1 + how far the first answer that is given is off the sum); 0 where none is given.

    The model is seldom right; a reward for that alone would be 0 in whole groups, from which nothing learns.
    """
    texts = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
    found = [ANSWER.search(text) for text in texts]
    return [
        0.0 if each is None else 1 / (1 + abs(int(each[1]) - right))
        for each, right in zip(found, answer, strict=True)
    ]


def grpo(
    path: Path = SMOLLM2 / "policy",
    *,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 4,
    max_tokens: int = 48,
    bf16: bool | None = None,
    folder: Path | None = None,
) -> list[Row]:
    """Rows of every seed: times of each arm's steps over TRL's own and over plain, and its rewards.

    `bf16` is TRL's; None: where the processor multiplies in it.
    """
    if bf16 is None:
        bf16 = working_dtype() == "bfloat16"
    cells: dict[str, Callable[[], list[Row]]] = {
        f"seed {seed}, {steps} steps, {ours}": partial(
            cell, str(path), seed, ours, steps=steps, max_tokens=max_tokens, bf16=bf16
        )
        for seed in seeds
        for ours in (OUR_TRAINER, OUR_LOOP)
    }
    return measured("trl_grpo", cells, folder=folder)


def cell(path: str, seed: int, ours: str, *, steps: int, max_tokens: int, bf16: bool) -> list[Row]:
    """One seed of ours, and of TRL's own beside it; who comes first goes round with the seed.

    Three processes at once: each holds weights, gradients, Adam's moments and activations of a step.
    """
    arms = [arm for arm in ARMS if arm[0] in (TRL, ours)]
    arms = [*arms[seed % len(arms) :], *arms[: seed % len(arms)]]
    common = {"path": path, "seed": seed, "steps": steps, "max_tokens": max_tokens, "bf16": bf16}
    runs = train_in_turn({f"{by}, {plan}": partial(run_arm, by, plan, **common) for by, plan in arms})
    return [
        {
            "by": by,
            "plan": plan,
            "beside": ours,
            **{name: common[name] for name in ("seed", "steps", "max_tokens", "bf16")},
            "prompts": NUM_PROMPTS,
            "prompts_per_step": PROMPTS_PER_STEP,
            "siblings": SIBLINGS,
            "reward": [step["reward"] for step in runs[f"{by}, {plan}"]],
            "generate_s": [step["generate_s"] for step in runs[f"{by}, {plan}"]],
            "step_s": [step["step_s"] for step in runs[f"{by}, {plan}"]],
            "tokens_per_forward": [step["tokens_per_forward"] for step in runs[f"{by}, {plan}"]],
            **{
                f"{what}_over_{base}": over(runs[f"{by}, {plan}"], runs[other], f"{what}_s")
                for what in ("generate", "step")
                for base, other in (("trl", f"{TRL}, generate"), ("plain", f"{by}, plain"))
                if other in runs
            },
        }
        for by, plan in ARMS
        if by in (TRL, ours)
    ]


def over(run: Sequence[Row], base: Sequence[Row], name: str) -> float:
    """Median of the ratios of steps; the first, which warms up, is left out if there are others."""
    ratios = [mine[name] / theirs[name] for mine, theirs in zip(run, base, strict=True)]
    return statistics.median(ratios[1:] or ratios)


def run_arm(by: str, plan: str, callback: TrainerCallback, **common: Any) -> list[Row]:
    """The steps of one arm, in a process of its own."""
    if by == OUR_LOOP:
        return run_loop(plan, callback, **common)
    return run_trainer(by, plan, callback, **common)


def run_trainer(
    by: str,
    plan: str,
    callback: TrainerCallback,
    *,
    path: str,
    seed: int,
    steps: int,
    max_tokens: int,
    bf16: bool,
) -> list[Row]:
    """Of a TRL trainer."""
    rows = train(
        STOCK if by == TRL else OURS,
        seed=seed,
        steps=steps,
        batch=PROMPTS_PER_STEP * SIBLINGS,
        group=SIBLINGS,
        model=path,
        reward=closeness,
        dataset=Dataset.from_list(problems(seed, path)),
        arguments={"max_completion_length": max_tokens, "learning_rate": LEARNING_RATE, "bf16": bf16},
        callbacks=[callback],
        **({} if by == TRL else {"rollout": RolloutConfig(plan=plan)}),
    )
    return [
        {
            "reward": row["reward"],
            "generate_s": row[GENERATE_S],
            "step_s": row["step_time"],
            "tokens_per_forward": row.get("rollout/tokens_per_forward"),
        }
        for row in rows
    ]


def run_loop(
    plan: str, callback: Any, *, path: str, seed: int, steps: int, max_tokens: int, bf16: bool
) -> list[Row]:
    """Of our loop; its learner multiplies in the precision of its weights, which is float32."""
    rows = problems(seed, path)
    config = RunConfig(
        name=f"{plan}_{seed}_{steps}",
        runs_dir=str(RUNS / "grpo"),
        seed=seed,
        policy=PolicyConfig(path=path),
        rollout=RolloutConfig(backend="local", num_replicas=1, plan=plan, max_tokens=max_tokens),
        train=TrainConfig(
            steps=steps,
            prompts_per_step=PROMPTS_PER_STEP,
            group_size=SIBLINGS,
            learning_rate=LEARNING_RATE,
            eval_every=0,
            checkpoint_every=0,
        ),
    )
    shutil.rmtree(config.run_dir, ignore_errors=True)  # of a run that was stopped
    task = from_rows(name="sums", train=rows, held_out=rows[:1], reward_fn=closeness)

    def wait(metrics: Mapping[str, Any]) -> None:
        callback.on_step_end(None, None, None)

    result = loop.train(config, task=task, callbacks=[wait])
    return [
        {
            "reward": row["reward"],
            "generate_s": row["rollout/duration_s"] + row["perf/weight_sync_s"],
            "step_s": row["step_time"],
            "tokens_per_forward": row["rollout/tokens_per_forward"],
        }
        for row in result.metrics
    ]
