"""What it costs to record every token."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.rows import Row
from benchmarks.turns import steps_in_turn
from benchmarks.workload import TWO_FORWARD, one_thread, prompts, requests
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.audit.check import check_audit
from blockroll.rollout.audit.files import audit_files
from blockroll.rollout.audit.writer import AuditWriter
from blockroll.rollout.drafters.engine import Engine
from blockroll.types import PLAIN, Plan, Sampling


def cost(*, batches: tuple[int, ...] = (1, 16, 64), repeats: int = 9, rollouts: int = 24) -> list[Row]:
    """Time of the shipped policy's rollouts with every token audited over the time without, one thread.

    Two engines take their steps in turn; what was written is checked at both levels.
    """
    with one_thread():
        return [_cost(plan, batch, repeats, rollouts) for plan in (PLAIN, TWO_FORWARD) for batch in batches]


def _cost(plan: Plan, batch: int, repeats: int, rollouts: int) -> Row:
    policy = HFPolicy.from_pretrained("tiny")
    texts = prompts(policy, max(rollouts, 6 * batch), seed=7)
    with tempfile.TemporaryDirectory() as folder:

        def ratio(repeat: int) -> float:
            # Ids of requests do not hold the seed: each run has a folder of its own.
            watching = ((), (AuditWriter(Path(folder) / str(repeat)),))
            engines = [
                Engine(policy, plan=plan, max_batch_size=batch, max_length=128, observers=observers)
                for observers in watching
            ]
            return steps_in_turn(engines, requests(texts, Sampling(max_tokens=64), seed=repeat))

        ratio(0)
        ratios = [ratio(repeat) for repeat in range(1, repeats + 1)]
        paths = audit_files(Path(folder) / "1")
        report = check_audit(paths, policy_of=lambda version: policy)
        assert report.passed, report.problem
        size = sum(path.stat().st_size for path in paths)
    return {
        "plan": plan.name,
        "batch": batch,
        "repeats": repeats,
        "rollouts": len(texts),
        "threads": 1,
        "time_ratio": float(np.median(ratios)),
        "time_ratio_low": float(np.quantile(ratios, 0.25)),
        "time_ratio_high": float(np.quantile(ratios, 0.75)),
        "time_ratio_all": ratios,
        "bytes_per_token": size / report.num_rows,
        "largest_difference": report.largest_difference,
    }


def experiments() -> dict[str, Callable[[], list[Row]]]:
    """Every experiment by the name of its result file."""
    return {"cost": cost}
