"""The long experiments of part 3, each writing its rows to benchmarks/results/.

    python -m benchmarks.evidence_part3                    everything that has no rows yet
    python -m benchmarks.evidence_part3 audit ...          these experiments, again

`constraints` needs SmolLM2 as examples/smollm2.py leaves it in runs/smollm2, and is left out without it.
The tests run a short form of each.
"""

import copy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.constrained import constrained
from benchmarks.evidence_part1 import Row, prompts, requests, write_rows
from benchmarks.evidence_part2 import SMOLLM2
from blockroll.config import DraftConfig
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.draft_trainer import DraftTrainer
from blockroll.rollout.audit.check import check_audit
from blockroll.rollout.audit.writer import AuditWriter, audit_files
from blockroll.rollout.engine.engine import Engine
from blockroll.types import PLAIN, Plan, Sampling

K = 8


def constraints(*, count: int = 500, real: int = 32) -> list[Row]:
    """Valid outputs with SmolLM2's tokenizer, for each plan and each kind of constraint.

    Many of a small model with random weights, to which every constraint is a surprise, and a few of SmolLM2,
    whose drafts are often accepted.
    """
    smollm2 = HFPolicy.from_pretrained(SMOLLM2 / "policy", adapter=SMOLLM2 / "adapter")
    plans = [PLAIN, Plan(4), Plan(4, (0,)), Plan(4, (0, 4))]
    subjects = (("random weights", random_speaker(smollm2), count), ("SmolLM2-135M-Instruct", smollm2, real))
    return [
        {"policy": name, **row}
        for name, policy, number in subjects
        for row in constrained(policy, plans, count=number)
    ]


def random_speaker(policy: HFPolicy) -> HFPolicy:
    """A two-layer model of the same vocabulary and tokenizer, with an adapter that has learned nothing."""
    torch.manual_seed(0)
    config = copy.deepcopy(policy.model.config)
    config.update({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2})
    config.update({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
    speaker = HFPolicy(type(policy.model)(config).eval(), policy.tokenizer)
    DraftTrainer(speaker, DraftConfig(block_sizes=(4,)))
    speaker.describe_drafts((4,), ("two_forward", "fused"))
    return speaker


def audit(*, batches: tuple[int, ...] = (1, 16, 64), repeats: int = 9, rollouts: int = 24) -> list[Row]:
    """Time of the shipped policy's rollouts with every token audited over the time without, one thread.

    Two engines draw the same tokens, a step of one after a step of the other, who comes first alternating:
    what else the machine does slows both alike. What was written is checked at both levels.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_audit_cost(plan, batch, repeats, rollouts) for plan in (PLAIN, Plan(K)) for batch in batches]
    finally:
        torch.set_num_threads(threads)


def _audit_cost(plan: Plan, batch: int, repeats: int, rollouts: int) -> Row:
    policy = HFPolicy.from_pretrained("tiny")
    texts = prompts(policy, max(rollouts, 6 * batch), seed=7)
    with tempfile.TemporaryDirectory() as folder:

        def ratio(repeat: int) -> float:
            # Ids of requests do not hold the seed: each run has a folder of its own.
            writers = (None, AuditWriter(Path(folder) / str(repeat)))
            engines = [
                Engine(policy, plan=plan, max_batch_size=batch, max_length=128, audit=writer)
                for writer in writers
            ]
            for engine in engines:
                engine.submit(requests(texts, Sampling(max_tokens=64), seed=repeat))
            seconds, num_steps = [0.0, 0.0], 0
            while engines[0].num_requests:
                for which in (0, 1) if num_steps % 2 else (1, 0):
                    start = time.perf_counter()
                    engines[which].step()
                    seconds[which] += time.perf_counter() - start
                num_steps += 1
            assert not engines[1].num_requests, "an audited engine drew other tokens"
            return seconds[1] / seconds[0]

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
    found = {"audit": audit}
    if (SMOLLM2 / "adapter").is_dir():
        found["constraints"] = constraints
    else:
        print(f"part 3: constraints is left out: no {SMOLLM2 / 'adapter'}; run examples/smollm2.py first")
    return found


if __name__ == "__main__":
    write_rows(3, experiments(), sys.argv[1:])
