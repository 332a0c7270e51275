"""The long experiments, by subject, each writing its rows to benchmarks/results/.

    python -m benchmarks.evidence law              everything of the subject that has no rows yet
    python -m benchmarks.evidence law texts ...    these experiments, again

An experiment with rows is not repeated; conversions and RL runs that were interrupted go on. What needs
SmolLM2 is left out, by name, without it: examples/smollm2.py says how to get it.
tests/benchmarks runs a short form of each.
"""

import argparse
import importlib

from benchmarks import rows

SUBJECTS = ("law", "speed", "drafts", "learning", "constraints", "audit", "trl")


def main() -> None:
    """Run the experiments named, or all of the subject that have no rows yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("experiments", nargs="*")
    given = parser.parse_args()
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
