"""The guard: how often it speaks without cause, and how soon with one. Whole runs: `watch_runs.py`.

    python -m benchmarks.evidence watch false_alarms power silent harm cost

Rows of a run are those of its metrics. One thread; runs go on from their checkpoints.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import watch_runs
from benchmarks.cells import measured
from benchmarks.rows import Row
from benchmarks.watch_runs import quiet, run_config
from benchmarks.workload import (
    LEARNING_TEMPERATURE,
    RUNS,
    K,
    has_checkpoint,
    prompts,
    requests,
    resumable,
    trained_adapter,
)
from blockroll.config import TrainConfig, WatchConfig
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.algorithms import ALGORITHMS
from blockroll.rl_loops.learner import Learner
from blockroll.rl_loops.loop import train
from blockroll.rl_loops.watch.guard import Guard
from blockroll.rl_loops.watch.watch import Watch
from blockroll.rollout.calibration.bets import Bets
from blockroll.rollout.calibration.evidence import Evidence
from blockroll.rollout.calibration.observer import DEAD_BAND, FUNCTIONALS, Calibration
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.trace import Watcher
from blockroll.types import Law, Plan, Rollout, Sampling
from tests import faults

ALPHA = 0.02  # of each test of a null run: at a millionth, no number of runs that fits here would show one
_EVERY_TEST = WatchConfig(
    calibration="warn",
    calibration_alpha=ALPHA,
    learner="warn",
    learner_alpha=ALPHA,
    acceptance="warn",
    acceptance_alpha=ALPHA,
    reward="warn",
    reward_alpha=ALPHA,
    shadow_share=1.0,
    alpha_budget=0.5,
    lift="never",
)


def false_alarms(
    *, cells: int = 20, runs: int = 100, steps: int = 1_000, folder: Path | None = None
) -> list[Row]:
    """Null runs: every claim holds, at its very edge; each test is looked at after every step."""
    named = {
        f"runs {first * runs} to {first * runs + runs - 1}, {steps} steps": partial(
            null_runs, range(first * runs, first * runs + runs), steps
        )
        for first in range(cells)
    }
    return measured("watch_false_alarms", named, folder=folder)


def null_runs(seeds: Sequence[int], steps: int) -> list[Row]:
    """One row: how many of these runs each test has spoken in."""
    spoke = dict.fromkeys((*Watch(_EVERY_TEST).guard.tests, "any"), 0)
    for seed in seeds:
        watch, generator = Watch(_EVERY_TEST), np.random.default_rng(seed)
        for step in range(steps):
            null_step(watch, generator)
            watch.guard.decide(step)
        found = [name for name, has_spoken in watch.guard._has_spoken.items() if has_spoken]
        for name in (*found, *(["any"] if found else [])):
            spoke[name] += 1
    return [{"num_runs": len(seeds), "num_steps": steps, "alpha": ALPHA, "spoke": spoke}]


def null_step(watch: Watch, generator: np.random.Generator, *, beyond: float = 0.0) -> None:
    """What a step may leave whose claims all hold, with means at the edges of what they allow, or beyond."""
    claims_N = generator.uniform(0.05, 0.9, 8)
    for name in FUNCTIONALS:
        if name == "rejected":
            never_N = (generator.random(8) < DEAD_BAND + beyond).astype(float)
            watch.observe_calibration(Evidence({name: Bets.on(never_N, 0.0, DEAD_BAND)}))
            continue
        values_N = (generator.random(8) < claims_N + DEAD_BAND + beyond).astype(float)
        bets = Bets.on(values_N, claims_N - DEAD_BAND, claims_N + DEAD_BAND)
        watch.observe_calibration(Evidence({name: bets}))
    ratios_N = np.where(generator.random(8) < 0.5, 0.5, 1.5 + 2 * DEAD_BAND)
    watch.guard.add("calibration/ratio", Bets.on_ratios(ratios_N, 1.0 + DEAD_BAND))
    off_N = (generator.random(8) < 4 * watch.tolerance) / 4.0  # mean: the tolerance
    watch.guard.observe("learner", off_N, high=watch.tolerance)
    watch._observe_acceptance(generator.beta(5, 5, 8).tolist())
    # Pairs differ in three of ten, with a mean of minus the tolerance.
    loss = watch.config.reward_tolerance
    signs = generator.choice([-1, 0, 1], size=4, p=[0.15 + loss / 2, 0.7, 0.15 - loss / 2])
    watch.observe_pairs([[float(s > 0)] for s in signs], [[float(s < 0)] for s in signs])


FUSED = Plan(K, (0, K // 2, K))
SAMPLING = Sampling(max_tokens=48, temperature=LEARNING_TEMPERATURE)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """A fault, the test that must see it, and what is decoded meanwhile."""

    fault: faults.Fault
    test: str
    plan: Plan = FUSED
    sampling: Sampling = SAMPLING

    @property
    def told_by(self) -> str:
        """The name of the test in the guard."""
        return self.test if self.test == "learner" else f"calibration/{self.test}"


PLANTED = {
    "residual replaced by the target": Planted(fault=faults.residual_is_the_target, test="rejected"),
    "the same under the mixed law": Planted(
        fault=faults.residual_is_the_target,
        test="rejected",
        sampling=dataclasses.replace(SAMPLING, law=Law(0.5)),
    ),
    "a mis-stated draft law": Planted(
        fault=faults.draft_law_of_another_temperature,
        test="draft",
        sampling=dataclasses.replace(SAMPLING, draft_temperature=0.7),
    ),
    "log-probabilities of another temperature": Planted(
        fault=faults.logprobs_of_another_temperature, test="learner"
    ),
    "the coin of a rejected draft again": Planted(
        fault=faults.coin_of_the_rejected_draft_again, test="residual"
    ),
    "one coin for draft and acceptance": Planted(
        fault=faults.coin_that_drew_the_draft_accepts_it, test="reused"
    ),
    "cache rows one late": Planted(fault=faults.cache_rows_one_late, test="learner", plan=Plan(0)),
    "positions one late": Planted(fault=faults.positions_one_late, test="learner", plan=Plan(0)),
}
STALE, HARM = "stale weights on one replica of two", "a reward lower by 0.05"


def power(
    adapter: Path | None = None, *, seeds: Sequence[int] = tuple(range(9)), folder: Path | None = None
) -> list[Row]:
    """How much is drawn until the test that must see a fault speaks, at its default alpha."""
    adapter = adapter or trained_adapter()
    cells: dict[str, Callable[[], list[Row]]] = {
        name: partial(delays, adapter, name, planted, seeds) for name, planted in PLANTED.items()
    }
    cells[STALE] = partial(stale_delays, seeds)
    cells[HARM] = partial(harm_delays, seeds)
    return measured("watch_power", cells, folder=folder)


def delays(adapter: Path, name: str, planted: Planted, seeds: Sequence[int]) -> list[Row]:
    """A row of one fault: tokens drawn, and values seen, until it is told; every step is looked at."""
    policy = HFPolicy.from_pretrained("tiny", adapter=adapter)
    learner = Learner(policy, TrainConfig(learner_threads=1), ALGORITHMS["grpo"])
    found = [_delay(policy, learner, planted, seed) for seed in seeds]
    return [
        _delay_row(name, f"calibration/{planted.test}" if planted.test != "learner" else "learner", found)
    ]


def _delay_row(name: str, test: str, found: Sequence[tuple[float, float]]) -> Row:
    drawn, seen = zip(*found, strict=True)
    return {
        "fault": name,
        "test": test,
        "seeds": len(found),
        "drawn": statistics.median(drawn),
        "drawn_most": max(drawn),
        "values": statistics.median(seen),
        "unit": "pairs" if test == "reward" else "tokens",
    }


def _delay(
    policy: HFPolicy, learner: Learner, planted: Planted, seed: int, batch: int = 32
) -> tuple[float, float]:
    """Tokens drawn, and values seen, until the test speaks; infinite beyond 200 batches."""
    watch, calibration = Watch(WatchConfig()), Calibration(seed)
    engine = Engine(policy, plan=planted.plan, observers=[Watcher(calibration, every=1)])
    test, num_drawn = planted.told_by, 0
    for index in range(200):
        texts = prompts(policy, batch, seed=1_000 * seed + index)
        asked = requests(texts, planted.sampling, seed=1_000 * seed + index)
        engine.submit(asked)
        finished: list[Rollout] = []
        with faults.planted(planted.fault):
            while engine.num_requests:
                result = engine.step()
                finished += result.finished
                num_drawn += sum(len(commit.token_ids) for commit in result.commits)
                watch.observe_calibration(calibration.take())
                if _speaks(watch.guard, test):
                    return num_drawn, watch.guard.evidence[test].num_values
        if planted.test == "learner":
            for rollout in finished:
                watch.observe_laws([rollout], learner.logprobs([rollout]).logprobs_N.cpu().numpy())
                if _speaks(watch.guard, test):
                    return num_drawn, watch.guard.evidence[test].num_values
    return math.inf, math.inf


def _speaks(guard: Guard, test: str) -> bool:
    return guard.evidence[test].log_e_max >= guard.threshold(test)


def stale_delays(seeds: Sequence[int], *, prompts_per_step: int = 16) -> list[Row]:
    """One of two replicas has the weights before the last update of a run at its usual learning rate."""
    found = []
    for seed in seeds:
        config = run_config("stale", seed, RUNS / "watch", steps=3, prompts_per_step=prompts_per_step)
        result = train(resumable(config), resume=has_checkpoint(config.run_dir), console=quiet())
        folders = sorted((result.run_dir / "checkpoints").glob("step_*"))
        old, new = (HFPolicy.from_pretrained(folder) for folder in folders[-2:])
        learner = Learner(new, TrainConfig(learner_threads=1), ALGORITHMS["grpo"])
        watch, num_drawn = Watch(WatchConfig()), 0
        for index in range(200):
            for policy in (old, new):
                asked = requests(
                    prompts(policy, 8, seed=1_000 * seed + index), Sampling(max_tokens=48), seed=index
                )
                engine = Engine(policy, plan=Plan(0))
                engine.submit(asked)
                finished: list[Rollout] = []
                while engine.num_requests:
                    finished += engine.step().finished
                num_drawn += sum(len(rollout.token_ids) for rollout in finished)
                watch.observe_laws(finished, learner.logprobs(finished).logprobs_N.cpu().numpy())
            if _speaks(watch.guard, "learner"):
                break
        found.append((num_drawn, watch.guard.evidence["learner"].num_values))
    return [_delay_row(STALE, "learner", found)]


def harm_delays(seeds: Sequence[int], *, group_size: int = 8) -> list[Row]:
    """Groups of right and wrong answers, whose chance differs by prompt, and is 0.05 lower under one law."""
    found = []
    for seed in seeds:
        config = WatchConfig(reward="lossless", shadow_share=1.0)
        watch, generator = Watch(config), np.random.default_rng(seed)
        num_pairs = 0
        while (
            watch.guard.evidence["reward"].log_e_max < watch.guard.threshold("reward") and num_pairs < 50_000
        ):
            chance = generator.beta(1.5, 1.5)
            arms = [generator.random(group_size) < p for p in (max(0.0, chance - 0.05), chance)]
            watch.observe_pairs(*([arm.astype(float).tolist()] for arm in arms))
            num_pairs += 1
        found.append((num_pairs, num_pairs))
    return [_delay_row(HARM, "reward", found)]


def experiments() -> dict[str, Callable[[], list[Row]]]:
    """Every experiment by the name of its result file."""
    return {
        "false_alarms": false_alarms,
        "power": power,
        "silent": watch_runs.silent,
        "harm": watch_runs.harm,
        "cost": watch_runs.cost,
    }
