"""What the host does in a step, and the sampler, at two commits: paired, on the tiny policy.

    python -m benchmarks.host 6ecbf33 HEAD          some ten minutes; goes on where it stopped
    python -m benchmarks.host 6ecbf33 HEAD --short  a few seconds, to see that it works

Each commit runs in an interpreter of its own on one torch thread (benchmarks/before_after.py). A pair is the
same rollouts in both, one directly after the other, who comes first alternating; the first is not counted.
Times are the processor's in one step, prefill left out (`engine.times`), so what else the machine does slows
them little: the host's is what forward and sampler leave over.
Rows go to runs/evidence/host as they come, and all of them to benchmarks/results/speed_host.jsonl at the end.
"""

import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.before_after import Asked, Worker, command, run_in_pairs
from benchmarks.rows import Row
from benchmarks.workload import RUNS

FOLDER = RUNS / "host"
RESULT = "speed_host"
PAIRS = 5
TOKENS = 32
TOKENS_ALONE = 96  # of one text: its steps are few and short
BATCHES = (1, 64, 256)
PLANS = ("plain", "two_forward(8)", "fused(8,[0,8])", "history(8)")
OPTIONS: tuple[Row, ...] = (
    {"top_p": 0.95},
    {"repetition_penalty": 1.1},
    {"bad_words_ids": [[70], [71, 72]]},
)
PARTS = ("host", "sampler", "step")


def cells(*, short: bool = False) -> Iterator[Row]:
    """Every plan at every batch; and each kind of law at one batch, plain and two-forward."""
    for batch in (1, 2) if short else BATCHES:
        for plan in PLANS:
            yield {"plan": plan, "batch": batch, "sampling": {}}
    for options in OPTIONS:
        for plan in PLANS[:2]:
            yield {"plan": plan, "batch": 2 if short else 64, "sampling": options}


def measured(cell: Row, before: Worker, after: Worker, *, pairs: int) -> Row:
    """Medians of both in milliseconds a step, and of after / before by pair: below 1 is faster."""
    found: list[tuple[Row, Row]] = []
    for pair in range(pairs + 1):
        order = (before, after) if pair % 2 else (after, before)
        told = {
            worker: worker.answer(
                measure="step_parts",
                plan=cell["plan"],
                batch=cell["batch"],
                sampling=cell["sampling"],
                max_tokens=TOKENS_ALONE if cell["batch"] == 1 else TOKENS,
                seed=pair,
            )
            for worker in order
        }
        found.append((told[before], told[after]))
    row = {"what": "processor time of a step by part", "policy": "tiny", **cell, "pairs": pairs, "threads": 1}
    for part in PARTS:
        values = [(old[f"{part}_ms"], new[f"{part}_ms"]) for old, new in found[1:]]
        ratios = [new / old for old, new in values]
        row |= {
            f"{part}_ms_before": statistics.median(old for old, _ in values),
            f"{part}_ms_after": statistics.median(new for _, new in values),
            f"{part}_ratio": statistics.median(ratios),
            f"{part}_ratio_low": min(ratios),
            f"{part}_ratio_high": max(ratios),
        }
    return row


def run(
    before: str, after: str, *, folder: Path = FOLDER, short: bool = False, minutes: float = 15
) -> tuple[list[Row], bool]:
    """All rows so far, and whether they are all; begun work is not repeated."""
    pairs = 1 if short else PAIRS

    def asked(old: Worker) -> Iterator[Asked]:
        for cell in cells(short=short):
            yield cell, partial(measured, cell, pairs=pairs)

    def told(row: Row) -> str:
        return ", ".join(f"{part} {row[f'{part}_ratio']:.2f}" for part in PARTS)

    return run_in_pairs(before, after, asked, told, folder=folder, short=short, minutes=minutes)


if __name__ == "__main__":
    command(__doc__, RESULT, run)
