"""Grouped rollouts of a real model over two epochs: the plan that chooses itself against plain decoding.

    python -m benchmarks.evidence speed grouped --gsm8k FILE

SmolLM2 (`examples/smollm2.py` says how to get it) answers worked sums and, if there is a file, questions of
GSM8K: 8 siblings a prompt, the same prompts twice. One thread, in turns (benchmarks/turns.py). Each repeat
has prompts of its own; engines remember those before, as in a job. Others beside it: benchmarks/peers.py.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.cells import GIVEN, measured
from benchmarks.history import groups
from benchmarks.rows import Row
from benchmarks.turns import PLAIN, figures, joined, subjects, waves_in_turn
from benchmarks.workload import SMOLLM2, one_thread
from blockroll.bench.prompts import gsm8k_prompts, worked_prompts
from blockroll.policies.hf import HFPolicy
from blockroll.types import Request, Sampling

ARITHMETIC, GSM8K = "arithmetic", "gsm8k"
PLANS = (PLAIN, "auto")
SIBLINGS = 8
EPOCHS = 2
PROMPTS = {1: 1, 8: 2, 32: 4}  # of one repeat, by batch
TEMPERATURES = (0.7, 1.0)
MAX_TOKENS = {ARITHMETIC: 64, GSM8K: 96}


def texts(policy: HFPolicy, kind: str, count: int) -> list[tuple[int, ...]]:
    """Prompts of a kind, as tokens."""
    if kind == ARITHMETIC:
        return worked_prompts(policy, count=count)
    return gsm8k_prompts(policy, GIVEN.gsm8k)[:count]


def cell(
    policy: HFPolicy,
    kind: str,
    temperature: float,
    batch: int,
    *,
    repeats: int,
    siblings: int = SIBLINGS,
    max_tokens: int | None = None,
) -> list[Row]:
    """A row for each plan and epoch, and for both epochs together."""
    count = PROMPTS[batch]
    sampling = Sampling(temperature=temperature, max_tokens=max_tokens or MAX_TOKENS[kind])
    prompts = texts(policy, kind, count * (repeats + 1))
    rounds: list[list[Request]] = []
    for index in range(repeats + 1):
        mine = prompts[index * count : (index + 1) * count]
        epochs = range(index * EPOCHS, (index + 1) * EPOCHS)
        rounds += ([*groups(mine, sampling, epoch, siblings=siblings)] for epoch in epochs)
    longest = max(map(len, prompts)) + sampling.max_tokens
    with subjects(policy, PLANS, batch=batch, max_length=longest) as turns:
        waves = waves_in_turn(turns, rounds[EPOCHS:], warm_up=rounds[0][:batch])
    about = {
        "policy": "SmolLM2-135M-Instruct",
        "dtype": str(policy.model.dtype).removeprefix("torch."),
        "threads": 1,
        "prompts": kind,
        "temperature": temperature,
        "batch": batch,
        "prompts_per_repeat": count,
        "siblings": siblings,
        "max_tokens": sampling.max_tokens,
    }
    rows = []
    for name, found in waves.items():
        parts = {epoch + 1: slice(epoch, None, EPOCHS) for epoch in range(EPOCHS)}
        rows += [
            {**about, "plan": name, "epoch": epoch, **figures(found[part], waves[PLAIN][part])}
            for epoch, part in parts.items()
        ]
        whole, base = (
            [joined(each[first : first + EPOCHS]) for first in range(0, len(each), EPOCHS)]
            for each in (found, waves[PLAIN])
        )
        rows.append({**about, "plan": name, "epoch": "both", **figures(whole, base)})
    return rows


def grouped(
    path: Path = SMOLLM2 / "policy",
    *,
    batches: Sequence[int] = tuple(PROMPTS),
    temperatures: Sequence[float] = TEMPERATURES,
    repeats: int = 3,
    dtype: str = "bfloat16",
    folder: Path | None = None,
    **sizes: int,
) -> list[Row]:
    """Rows of every kind of prompt, temperature and batch."""
    kinds = [ARITHMETIC, *([GSM8K] if GIVEN.gsm8k.is_file() else [])]
    if GSM8K not in kinds:
        print(
            f"speed: {GSM8K} is left out: no {GIVEN.gsm8k}; put one of its files there, or name it by --gsm8k"
        )
    with one_thread():
        policy = HFPolicy.from_pretrained(path, dtype=dtype)
        cells: dict[str, Callable[[], list[Row]]] = {
            f"{kind} at {temperature:g}, batch {batch}, {repeats} repeats": partial(
                cell, policy, kind, temperature, batch, repeats=repeats, **sizes
            )
            for kind in kinds
            for temperature in temperatures
            for batch in batches
        }
        return measured("speed_grouped", cells, folder=folder)
