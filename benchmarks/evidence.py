"""The long experiments, by subject, each writing its rows to benchmarks/results/.

    python -m benchmarks.evidence law              everything of the subject that has no rows yet
    python -m benchmarks.evidence law texts ...    these experiments, again
        --minutes 10     experiments of many cells begin none after so long; what they have is written
        --gsm8k FILE     a file of GSM8K, for those that ask its questions; else runs/gsm8k.jsonl

An experiment with rows is not repeated; conversions, RL runs and experiments of many cells that were stopped
go on. What needs SmolLM2 is left out, by name, without it: examples/smollm2.py says how to get it.
tests/benchmarks runs a short form of each.
"""

import argparse
import importlib
import time
from pathlib import Path

from benchmarks import rows
from benchmarks.cells import GIVEN

SUBJECTS = ("law", "speed", "drafts", "learning", "constraints", "audit", "trl", "kernels", "watch")


def main() -> None:
    """Run the experiments named, or all of the subject that have no rows yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("experiments", nargs="*")
    parser.add_argument("--minutes", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--gsm8k", type=Path, default=GIVEN.gsm8k, help=argparse.SUPPRESS)
    given = parser.parse_args()
    GIVEN.gsm8k = given.gsm8k
    if given.minutes is not None:
        GIVEN.deadline = time.monotonic() + 60 * given.minutes
    found = importlib.import_module(f"benchmarks.{given.subject}").experiments()
    unknown = set(given.experiments) - found.keys()
    if unknown:
        parser.error(f"{given.subject} has no {', '.join(sorted(unknown))}; it has {', '.join(found)}")
    for name, experiment in found.items():
        file = f"{given.subject}_{name}"
        if name in given.experiments or (not given.experiments and not rows.has_rows(file)):
            print(file, flush=True)
            rows.write(file, experiment())


if __name__ == "__main__":
    main()
