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
from benchmarks.watch_acceptance import acceptance
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
from blockroll.rl_loops.watch.e_process import is_start, log_e_of, with_start
from blockroll.rl_loops.watch.guard import Guard, Test
from blockroll.rl_loops.watch.watch import Watch
from blockroll.rollout.calibration.bets import NUM_BETS, log_wealth
from blockroll.rollout.calibration.observer import DEAD_BAND, Calibration
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


def false_alarms(*, runs: int = 2_000, steps: int = 1_000, seed: int = 0) -> list[Row]:
    """Null runs: every claim holds, at its very edge; each test is looked at after every step."""
    spoke = {
        test.name: null_runs(test, runs, steps, seed) for test in Watch(_EVERY_TEST).guard.tests.values()
    }
    counts = {name: int(found.sum()) for name, found in spoke.items()}
    counts["any"] = int(np.any([*spoke.values()], axis=0).sum())
    return [{"num_runs": runs, "num_steps": steps, "alpha": ALPHA, "spoke": counts}]


def null_runs(test: Test, num_runs: int, num_steps: int, seed: int) -> np.ndarray:
    """Which of so many runs one test speaks in, bool (runs,): the sums of `EProcess`, all runs at once."""
    generator = np.random.default_rng([seed, *test.name.encode()])
    chosen = {"above": [0], "below": [1], "both": [0, 1]}[test.sides]
    total, starts = np.zeros((num_runs, 2, NUM_BETS)), np.full((num_runs, 2, NUM_BETS), -np.inf)
    num_starts, has_spoken = 0, np.zeros(num_runs, dtype=bool)
    for step in range(num_steps):
        if is_start(step):
            num_starts += 1
            starts = with_start(starts, total, num_starts)
        total = total + null_bets(test.name, num_runs, generator)
        log_e = log_e_of(total[:, chosen], starts[:, chosen], num_starts)
        has_spoken |= log_e >= -math.log(test.alpha)
    return has_spoken


def null_bets(name: str, num_runs: int, generator: np.random.Generator, *, beyond: float = 0.0) -> np.ndarray:
    """What a step may leave whose claim holds, with a mean at the edge of what it allows, or beyond."""
    shape = (num_runs, 8)
    if name == "calibration/ratio":
        ratios = np.where(generator.random(shape) < 0.5, 0.5, 1.5 + 2 * DEAD_BAND + 2 * beyond)
        above = np.log1p((ratios / (1 + DEAD_BAND) - 1)[..., None] * 0.5 ** np.arange(1, NUM_BETS + 1))
        return np.stack([above.sum(axis=1), np.zeros((num_runs, NUM_BETS))], axis=1)
    if name == "calibration/rejected":
        claims, low, high = np.zeros(shape), np.zeros(shape), np.full(shape, DEAD_BAND)
    elif name == "learner":
        tolerance = Watch(_EVERY_TEST).tolerance
        # A quarter where the two differ at all: the mean is the tolerance.
        values = (generator.random(shape) < 4 * tolerance + beyond) / 4.0
        return log_wealth(values, np.zeros(shape), np.full(shape, tolerance))
    elif name == "reward":
        # Pairs differ in three of ten, with a mean of minus the tolerance.
        loss = _EVERY_TEST.reward_tolerance + beyond
        signs = generator.choice([-1, 0, 1], size=(num_runs, 4), p=[0.15 + loss / 2, 0.7, 0.15 - loss / 2])
        edge = np.full(signs.shape, (1 - _EVERY_TEST.reward_tolerance) / 2)
        return log_wealth((1 + signs) / 2, edge, np.ones(signs.shape))
    else:
        claims = generator.uniform(0.05, 0.9, shape)
        band = _EVERY_TEST.acceptance_tolerance if name == "acceptance" else DEAD_BAND
        low, high = claims - band, claims + band
        claims = claims + band - DEAD_BAND
    values = (generator.random(shape) < claims + DEAD_BAND + beyond).astype(float)
    return log_wealth(values, low, high)


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
        "acceptance": acceptance,
    }
