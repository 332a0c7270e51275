"""The long experiments of part 1, each writing its rows to benchmarks/results/.

    python -m benchmarks.evidence_part1            everything that has no rows yet
    python -m benchmarks.evidence_part1 speed ...  these experiments, again

An experiment with rows is not repeated; RL runs that were interrupted go on from their checkpoints.
The tests run a short form of each.
"""

import itertools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from blockroll.bench.bench import BenchOptions, run_bench, to_record
from blockroll.config import PolicyConfig, RolloutConfig, RunConfig, TrainConfig
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.arithmetic import problems, reward
from blockroll.rl_loops.loop import load_run_config, train
from blockroll.rollout.engine.engine import Engine
from blockroll.types import PLAIN, Plan, Request, Rollout, Sampling
from tests.equality import assert_same_rollouts

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs") / "evidence_part1"
TWO_FORWARD = Plan(8)
BATCH = 64
LEARNING_TEMPERATURE = 1.5


def provenance() -> Row:
    """Where and from what a row was measured; changes of the rows themselves do not count as changes."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return {
        "commit": f"{commit}+changes" if changes else commit or None,
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }


def _git(*arguments: str) -> str:
    root = Path(__file__).parents[1]
    return subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=False, cwd=root
    ).stdout.strip()


def prompts(policy: HFPolicy, count: int, *, seed: int = 1) -> list[tuple[int, ...]]:
    """Held-out arithmetic prompts as tokens."""
    assert policy.tokenizer is not None, "evidence needs the policy's tokenizer"
    texts = (problem.prompt for problem in problems(seed, held_out=True))
    return [tuple(policy.tokenizer(text)["input_ids"]) for text in itertools.islice(texts, count)]


def requests(texts: Iterable[tuple[int, ...]], sampling: Sampling, *, seed: int = 0) -> list[Request]:
    """One request per prompt; seeds differ between calls with another `seed`."""
    return [
        Request(request_id=str(index), prompt_ids=text, seed=(seed << 32) + index, sampling=sampling)
        for index, text in enumerate(texts)
    ]


def decode(
    policy: HFPolicy, wanted: Sequence[Request], plan: Plan, *, batch: int = BATCH
) -> dict[str, Rollout]:
    """All rollouts by request id."""
    engine = Engine(policy, plan=plan, max_batch_size=batch, max_length=256)
    engine.submit(wanted)
    finished: dict[str, Rollout] = {}
    while engine.num_requests:
        finished.update((rollout.request.request_id, rollout) for rollout in engine.step().finished)
    return finished


def greedy_equality(policy: HFPolicy, *, count: int = 200, plan: Plan = TWO_FORWARD) -> list[Row]:
    """Greedy drafting against greedy plain, token for token."""
    wanted = requests(prompts(policy, count), Sampling(temperature=0, max_tokens=64))
    plain, drafted = decode(policy, wanted, PLAIN), decode(policy, wanted, plan)
    near_ties = assert_same_rollouts(plain, drafted, policy, at_most=None)
    return [
        {
            "check": f"greedy {plan.name} equals greedy plain",
            "prompts": count,
            "tokens": sum(len(rollout.token_ids) for rollout in plain.values()),
            "differing_rollouts_all_at_ties": len(near_ties),
            "acceptance_rate": acceptance_rate(drafted.values()),
        }
    ]


def logprob_equality(policy: HFPolicy, *, count: int = 1000) -> list[Row]:
    """Recorded policy_logprob against a fresh causal forward of the finished text."""
    wanted = requests(prompts(policy, count), Sampling(max_tokens=64))
    rows = []
    for plan in (PLAIN, TWO_FORWARD):
        differences = [
            difference
            for rollout in decode(policy, wanted, plan).values()
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
            for rollout in decode(policy, requests(repeated, sampling, seed=seed), each).values()
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
        lengths.append(Counter(("all", len(rollout.token_ids)) for rollout in rollouts.values()))
        rewards.append(
            [
                reward(policy.decode(list(rollouts[str(i)].token_ids)), p.answer)
                for i, p in enumerate(problem_list)
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


def speed(policy: HFPolicy, *, batches: tuple[int, ...] = (1, 4, 16, 64), repeats: int = 7) -> list[Row]:
    """Plain, two-forward and transformers' generate, alternating in one run; one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        options = BenchOptions(batches=batches, repeats=repeats, rollouts=16, max_tokens=(64,))
        rows = run_bench(
            policy,
            prompts(policy, 128, seed=7),
            [PLAIN, TWO_FORWARD],
            options,
            policy_path="tiny",
            against=("generate",),
        )
    finally:
        torch.set_num_threads(threads)
    return [to_record(row) for row in rows]


def learning(
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
            runs_dir=str(RUNS),
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


def resumable(config: RunConfig) -> RunConfig:
    """The run's own config if it was begun, else the one given; a run without a checkpoint starts over."""
    if has_checkpoint(config.run_dir):
        return replace(load_run_config(config.run_dir), train=config.train)
    shutil.rmtree(config.run_dir, ignore_errors=True)
    return config


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a run can go on."""
    return any((run_dir / "checkpoints").glob("step_*"))


def acceptance_rate(rollouts: Iterable[Rollout]) -> float:
    """Accepted drafts per draft submitted to verify."""
    counts = [(rollout.stats.num_accepted, rollout.stats.num_drafted) for rollout in rollouts]
    return sum(accepted for accepted, _ in counts) / max(1, sum(drafted for _, drafted in counts))


def experiments() -> dict[str, Callable[[], list[Row]]]:
    """Every experiment by the name of its result file."""
    policy = HFPolicy.from_pretrained("tiny")
    return {
        "greedy": lambda: greedy_equality(policy),
        "logprobs": lambda: logprob_equality(policy),
        "law": lambda: law_equality(policy),
        "speed": lambda: speed(policy),
        "learning": learning,
    }


def write_rows(part: int, found: dict[str, Callable[[], list[Row]]], names: Sequence[str]) -> None:
    """Run the experiments named, or all that have no rows yet; rows appear whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    for name, experiment in found.items():
        path = RESULTS / f"part{part}_{name}.jsonl"
        if (names and name not in names) or (not names and path.exists()):
            continue
        print(f"part {part}: {name}", flush=True)
        rows = experiment()
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps({**row, **provenance()}) + "\n" for row in rows))
        partial.rename(path)


if __name__ == "__main__":
    write_rows(1, experiments(), sys.argv[1:])
