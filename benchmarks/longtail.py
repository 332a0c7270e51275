"""The long tail of a batch: requests of very unequal lengths, and the time until the last one has ended.

    python -m benchmarks.evidence speed longtail

The tiny policy's causal part with an adapter, and SmolLM2 as it comes (`examples/smollm2.py` says how to get
it); one thread, in turns (benchmarks/turns.py). Lengths are drawn from a log-normal law and then fixed: every
plan decodes texts of the same lengths. Prompts are either a few groups of siblings, the same ones in every
repeat, as epochs ask them, or unlike ones that come once.
"""

import math
import os
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.cells import measured
from benchmarks.history import groups
from benchmarks.rows import Row
from benchmarks.turns import PLAIN, figures, subjects, waves_in_turn
from benchmarks.workload import (
    RUNS,
    SMOLLM2,
    K,
    causal_part,
    one_thread,
    prompts,
    trained_adapter,
    working_dtype,
)
from blockroll.bench.prompts import worked_prompts
from blockroll.policies.hf import HFPolicy
from blockroll.types import Request, Sampling

PLANS = (PLAIN, f"two_forward({K})", f"history({K})", "auto")
REAL_PLANS = (PLAIN, "auto")
BATCH = 64  # places; the requests of a repeat are submitted together
COUNT = 200
REAL_COUNT, REAL_REPEATS = 64, 5
SIBLINGS = 8
SHORTEST, MEDIAN, LONGEST = 3, 17, 400
SPREAD = 1.6  # of the logarithm of lengths: the mean is then 47 or so
GROUPED, UNLIKE = "grouped, repeating", "unlike"
# Policy, kind, how many and which repeat: the prompts.
Ask = Callable[[HFPolicy, str, int, int], list[tuple[int, ...]]]


def lengths(count: int, *, seed: int) -> list[int]:
    """Tokens of each text: half of them short, a few very long."""
    draw = random.Random(f"long tail {seed}")
    drawn = (round(draw.lognormvariate(math.log(MEDIAN), SPREAD)) for _ in range(count))
    return [min(max(each, SHORTEST), LONGEST) for each in drawn]


def asked_of_tiny(policy: HFPolicy, kind: str, count: int, index: int) -> list[tuple[int, ...]]:
    """So many prompts of one repeat."""
    return prompts(policy, count, seed=11 if kind == GROUPED else 100 + index)


def asked_of_real(policy: HFPolicy, kind: str, count: int, index: int) -> list[tuple[int, ...]]:
    """So many sums behind others that are worked out."""
    start = 0 if kind == GROUPED else index * count
    return worked_prompts(policy, start + count)[start:]


def repeat(policy: HFPolicy, ask: Ask, kind: str, count: int, index: int) -> list[Request]:
    """The requests of one repeat."""
    siblings = SIBLINGS if kind == GROUPED else 1
    texts = ask(policy, kind, -(-count // siblings), index)
    asked = [*groups(texts, Sampling(ignore_eos=True), index, siblings=siblings)][:count]
    return [
        replace(request, sampling=replace(request.sampling, max_tokens=length))
        for request, length in zip(asked, lengths(count, seed=index), strict=True)
    ]


def cell(
    make: Callable[[], HFPolicy],
    name: str,
    plans: Sequence[str],
    ask: Ask,
    kind: str,
    *,
    count: int,
    batch: int,
    repeats: int,
) -> list[Row]:
    """A row for each plan."""
    policy = make()
    rounds = [repeat(policy, ask, kind, count, index) for index in range(repeats + 1)]
    asked = [request.sampling.max_tokens for requests in rounds[1:] for request in requests]
    with subjects(policy, plans, batch=batch, max_length=0) as turns:
        waves = waves_in_turn(turns, rounds[1:], warm_up=rounds[0])
    about = {
        "policy": name,
        "dtype": str(policy.model.dtype).removeprefix("torch."),
        "threads": 1,
        "prompts": kind,
        "batch": batch,
        "siblings": SIBLINGS if kind == GROUPED else 1,
        "length_median": statistics.median(asked),
        "length_mean": statistics.mean(asked),
        "length_longest": max(asked),
    }
    return [
        {
            **about,
            "plan": name,
            **figures(found, waves[PLAIN]),
            "seconds": statistics.median(wave.duration_s for wave in found),
            "time_over_plain": statistics.median(ratios(found, waves[PLAIN])),
            "time_over_plain_all": ratios(found, waves[PLAIN]),
        }
        for name, found in waves.items()
    ]


def ratios(waves: Sequence, plain: Sequence) -> list[float]:
    """Time to the last token over plain's, repeat by repeat."""
    return [wave.duration_s / base.duration_s for wave, base in zip(waves, plain, strict=True)]


def longtail(
    adapter: Path | None = None,
    *,
    count: int = COUNT,
    batch: int = BATCH,
    repeats: int = 7,
    real: Path = SMOLLM2 / "policy",
    real_count: int = REAL_COUNT,
    real_repeats: int = REAL_REPEATS,
    folder: Path | None = None,
) -> list[Row]:
    """Time to the last token under each plan, over plain's, on prompts that repeat and on unlike ones.

    `real` is a checkpoint that is measured as well; without it the tiny policy is measured alone.
    """
    os.environ["BLOCKROLL_CACHE"] = str(RUNS / "cache")
    with one_thread():
        tiny = partial(causal_part, adapter or trained_adapter())
        cells = {
            f"{kind}, {count} requests, batch {batch}, {repeats} repeats": partial(
                cell, tiny, "tiny", PLANS, asked_of_tiny, kind, count=count, batch=batch, repeats=repeats
            )
            for kind in (GROUPED, UNLIKE)
        }
        if (real / "config.json").is_file():
            load, name = partial(HFPolicy.from_pretrained, real, dtype=working_dtype()), "SmolLM2-135M"
            cells |= {
                f"{name}, {kind}, {real_count} requests, batch {batch}, {real_repeats} repeats": partial(
                    cell,
                    load,
                    name,
                    REAL_PLANS,
                    asked_of_real,
                    kind,
                    count=real_count,
                    batch=batch,
                    repeats=real_repeats,
                )
                for kind in (GROUPED, UNLIKE)
            }
        else:
            print(
                f"speed: the long tail of a real model is left out: no {real}; run examples/smollm2.py first"
            )
        return measured("speed_longtail", cells, folder=folder)
