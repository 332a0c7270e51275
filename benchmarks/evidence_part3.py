"""The long experiments of part 3, each writing its rows to benchmarks/results/.

    python -m benchmarks.evidence_part3                    everything that has no rows yet
    python -m benchmarks.evidence_part3 constraints ...    these experiments, again

`constraints` needs SmolLM2 as examples/smollm2.py leaves it in runs/smollm2, and is left out without it.
The tests run a short form of each.
"""

import sys
from collections.abc import Callable

from benchmarks.constrained import constrained
from benchmarks.evidence_part1 import Row, write_rows
from benchmarks.evidence_part2 import SMOLLM2
from blockroll.policies.hf import HFPolicy
from blockroll.types import PLAIN, Plan


def constraints() -> list[Row]:
    """Valid outputs of SmolLM2, of 500 for each plan and each kind of constraint."""
    policy = HFPolicy.from_pretrained(SMOLLM2 / "policy", adapter=SMOLLM2 / "adapter")
    num_drafts = policy.trained_drafts
    plans = [PLAIN, Plan(num_drafts), Plan(num_drafts, (0,)), Plan(num_drafts, (0, num_drafts))]
    return [{"policy": "SmolLM2-135M-Instruct", **row} for row in constrained(policy, plans, count=500)]


def experiments() -> dict[str, Callable[[], list[Row]]]:
    """Every experiment by the name of its result file."""
    found = {}
    if (SMOLLM2 / "adapter").is_dir():
        found["constraints"] = constraints
    else:
        print(f"part 3: constraints is left out: no {SMOLLM2 / 'adapter'}; run examples/smollm2.py first")
    return found


if __name__ == "__main__":
    write_rows(3, experiments(), sys.argv[1:])
