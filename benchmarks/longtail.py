"""The long tail of a batch: requests of very unequal lengths, and the time until the last one has ended.

    python -m benchmarks.evidence speed longtail

The tiny policy's causal part with an adapter, one thread, in turns (benchmarks/turns.py). Lengths are drawn
from a log-normal law and then fixed: every plan decodes texts of the same lengths. Prompts are either a few
groups of siblings, the same ones in every repeat, as epochs ask them, or unlike ones that come once.
"""

import math
import os
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.cells import measured
from benchmarks.history import groups
from benchmarks.rows import Row
from benchmarks.turns import PLAIN, figures, subjects, waves_in_turn
from benchmarks.workload import RUNS, K, causal_part, one_thread, prompts, trained_adapter
from blockroll.policies.hf import HFPolicy
from blockroll.types import Request, Sampling

PLANS = (PLAIN, f"two_forward({K})", f"history({K})", "auto")
BATCH = 64  # places; the requests of a repeat are submitted together
COUNT = 200
SIBLINGS = 8
SHORTEST, MEDIAN, LONGEST = 3, 17, 400
SPREAD = 1.6  # of the logarithm of lengths: the mean is then 47 or so
GROUPED, UNLIKE = "grouped, repeating", "unlike"


def lengths(count: int, *, seed: int) -> list[int]:
    """Tokens of each text: half of them short, a few very long."""
    draw = random.Random(f"long tail {seed}")
    drawn = (round(draw.lognormvariate(math.log(MEDIAN), SPREAD)) for _ in range(count))
    return [min(max(each, SHORTEST), LONGEST) for each in drawn]


def repeat(policy: HFPolicy, kind: str, count: int, index: int) -> list[Request]:
    """The requests of one repeat."""
    siblings = SIBLINGS if kind == GROUPED else 1
    num_prompts = -(-count // siblings)
    texts = prompts(policy, num_prompts, seed=11 if kind == GROUPED else 100 + index)
    asked = [*groups(texts, Sampling(ignore_eos=True), index, siblings=siblings)][:count]
    return [
        replace(request, sampling=replace(request.sampling, max_tokens=length))
        for request, length in zip(asked, lengths(count, seed=index), strict=True)
    ]


def cell(policy: HFPolicy, kind: str, *, count: int, batch: int, repeats: int) -> list[Row]:
    """A row for each plan."""
    rounds = [repeat(policy, kind, count, index) for index in range(repeats + 1)]
    asked = [request.sampling.max_tokens for requests in rounds[1:] for request in requests]
    with subjects(policy, PLANS, batch=batch, max_length=0) as turns:
        waves = waves_in_turn(turns, rounds[1:], warm_up=rounds[0])
    about = {
        "policy": "tiny",
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
    folder: Path | None = None,
) -> list[Row]:
    """Time to the last token under each plan, over plain's, on prompts that repeat and on unlike ones."""
    os.environ["BLOCKROLL_CACHE"] = str(RUNS / "cache")
    with one_thread():
        policy = causal_part(adapter or trained_adapter())
        cells = {
            f"{kind}, {count} requests, batch {batch}, {repeats} repeats": partial(
                cell, policy, kind, count=count, batch=batch, repeats=repeats
            )
            for kind in (GROUPED, UNLIKE)
        }
        return measured("speed_longtail", cells, folder=folder)
