"""Acceptance against reward over RL runs: lossless and mixed rollouts, drafts aligned and left alone.

python -m benchmarks.evidence watch acceptance
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.cells import measured
from benchmarks.rows import Row
from benchmarks.trl import run_of_tiny
from benchmarks.workload import RUNS, causal_part, trained_adapter

MIX_WEIGHT = 0.5
ARMS = {
    "lossless, left alone": (1.0, False),
    "lossless, aligned": (1.0, True),
    "mixed, left alone": (MIX_WEIGHT, False),
    "mixed, aligned": (MIX_WEIGHT, True),
}
CURVES = ("reward", "rollout/acceptance_rate", "rollout/tokens_per_forward", "kl")


def acceptance(
    adapter: Path | None = None,
    *,
    seeds: Sequence[int] = (0, 1),
    steps: int = 60,
    batch: int = 64,
    learning_rate: float = 3e-4,
    folder: Path | None = None,
) -> list[Row]:
    """A row for each run by TRL's GRPO: its curves, the KL from the first policy among them.

    Mixed rollouts are corrected by token, truncated. Of the law in use are rewards and acceptance.
    """
    policy, adapter = RUNS / "policy", adapter or trained_adapter()
    causal_part().save_pretrained(policy)
    cells: dict[str, Callable[[], list[Row]]] = {
        f"seed {seed}, {arm}, {steps} steps": partial(
            run, policy, adapter, seed, arm, steps=steps, batch=batch, learning_rate=learning_rate
        )
        for seed, arm in itertools.product(seeds, ARMS)
    }
    return measured("watch_acceptance", cells, folder=folder)


def run(
    policy: Path, adapter: Path, seed: int, arm: str, *, steps: int, batch: int, learning_rate: float
) -> list[Row]:
    """One run."""
    mix_weight, is_aligned = ARMS[arm]
    rows = run_of_tiny(
        policy,
        adapter,
        seed,
        is_aligned=is_aligned,
        mix_weight=mix_weight,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        vllm_importance_sampling_mode="token_truncate",
    )
    about = {
        "seed": seed,
        "arm": arm,
        "mix_weight": mix_weight,
        "is_aligned": is_aligned,
        "steps": steps,
        "batch": batch,
    }
    return [{**about, **{name: [row.get(name) for row in rows] for name in CURVES}}]
