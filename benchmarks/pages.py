"""Slots against pages, the two layouts of a cache: what they take of a processor's time, and of memory.

    python -m benchmarks.evidence speed pages

The tiny policy, decoding plainly, on one thread. Both layouts decode the same requests within a repeat, one
after the other, who comes first alternating; ratios are within a repeat. The memory is that of texts of
unequal lengths (benchmarks/longtail.py), all of them at once.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.cells import measured
from benchmarks.longtail import lengths
from benchmarks.rows import Row
from benchmarks.workload import one_thread
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.cache.contract import Cache
from blockroll.rollout.engine.cache.layouts import PAGE_SIZE, Layout
from blockroll.rollout.engine.cache.pages import PagedCache
from blockroll.rollout.engine.cache.slots import SlotCache
from blockroll.types import PLAIN, Request, Sampling

LAYOUTS: tuple[Layout, ...] = ("slots", "pages")
BATCHES = (1, 8, 64)
CONTEXTS = (64, 512)
MAX_TOKENS = 48
REPEATS = 5
COUNT = 64  # texts of unequal lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What it took to decode some requests."""

    num_tokens: int
    wall_s: float  # of decode steps, prefill excluded
    cpu_s: float  # of all


def pages() -> list[Row]:
    """A row for each batch and context, and one for each layout of the memory that it took."""
    policy = HFPolicy.from_pretrained("tiny")
    cells = {
        f"batch {batch}, context {context}, {REPEATS} repeats": partial(speed, policy, batch, context)
        for context in CONTEXTS
        for batch in BATCHES
    }
    cells |= {f"memory of {layout}, {COUNT} texts": partial(memory, policy, layout) for layout in LAYOUTS}
    return measured("speed_pages", cells)


def speed(policy: HFPolicy, batch: int, context: int, *, repeats: int = REPEATS) -> list[Row]:
    """Tokens per second of pages over those of slots."""
    taken: dict[Layout, list[Taken]] = {layout: [] for layout in LAYOUTS}
    with one_thread():
        engines = {
            layout: Engine(policy, plan=PLAIN, max_batch_size=batch, cache=layout) for layout in LAYOUTS
        }
        for repeat in range(-1, repeats):
            asked = requests(policy, [MAX_TOKENS] * batch, context=context - MAX_TOKENS // 2, seed=repeat)
            for layout in LAYOUTS if repeat % 2 else LAYOUTS[::-1]:
                found = decode(engines[layout], asked)
                if repeat >= 0:
                    taken[layout].append(found)
    slots, paged = taken["slots"], taken["pages"]
    ratios = [mine.wall_s / other.wall_s for mine, other in zip(slots, paged, strict=True)]
    cpu_ratios = [mine.cpu_s / other.cpu_s for mine, other in zip(slots, paged, strict=True)]
    return [
        {
            "what": "decode steps",
            "policy": "tiny",
            "plan": PLAIN.name,
            "threads": 1,
            "batch": batch,
            "context": context,
            "page_size": PAGE_SIZE,
            "pairs": repeats,
            "slots_tokens_per_s": statistics.median(each.num_tokens / each.wall_s for each in slots),
            "pages_to_slots": statistics.median(ratios),
            "pages_to_slots_low": min(ratios),
            "pages_to_slots_high": max(ratios),
            "pages_to_slots_all": ratios,
            "cpu_pages_to_slots": statistics.median(cpu_ratios),
        }
    ]


def memory(policy: HFPolicy, layout: Layout, *, count: int = COUNT) -> list[Row]:
    """What a cache takes for texts of unequal lengths: bytes in all, and rows for those that run.

    Texts that have ended stay while nobody needs their memory: bytes say what was taken, rows what is needed.
    """
    engine = Engine(policy, plan=PLAIN, max_batch_size=count, cache=layout)
    engine.submit(requests(policy, lengths(count, seed=0), context=16, seed=0))
    cache, most_held, most_bytes = engine._cache, 0, 0
    running_rows: list[float] = []
    while engine.num_requests:
        engine.step()
        num_held = sum(cache.lengths(0, cache.num_open))
        most_held = max(most_held, num_held)
        if num_held:
            running_rows.append(num_rows_of_running(cache) / num_held)
        most_bytes = max(most_bytes, cache.num_bytes)
    return [
        {
            "what": "memory of unequal lengths",
            "policy": "tiny",
            "plan": PLAIN.name,
            "layout": layout,
            "page_size": cache.page_size,
            "rollouts": count,
            "length_mean": statistics.mean(lengths(count, seed=0)),
            "length_longest": max(lengths(count, seed=0)),
            "most_tokens_held": most_held,
            "peak_bytes": most_bytes,
            "running_rows_per_token": statistics.mean(running_rows),
        }
    ]


def num_rows_of_running(cache: Cache) -> int:
    """Rows of memory that nobody else can have."""
    if isinstance(cache, PagedCache):
        return cache.num_pages_running * cache.page_size
    assert isinstance(cache, SlotCache)
    return cache.num_open * cache.capacity


def requests(policy: HFPolicy, num_tokens: Sequence[int], *, context: int, seed: int) -> list[Request]:
    """One for each number of tokens, behind unlike prompts of so many."""
    draw = random.Random(f"pages {seed}")
    return [
        Request(
            request_id=f"{seed} {index}",
            prompt_ids=tuple(draw.randrange(4, policy.vocab_size) for _ in range(context)),
            seed=index,
            sampling=Sampling(max_tokens=number, ignore_eos=True),
        )
        for index, number in enumerate(num_tokens)
    ]


def decode(engine: Engine, asked: Sequence[Request]) -> Taken:
    """All of them to their ends."""
    engine.reset_times()
    engine.forget_prefixes()
    started = time.process_time()
    engine.submit(asked)
    num_tokens = 0
    while engine.num_requests:
        num_tokens += sum(len(rollout.token_ids) for rollout in engine.step().finished)
    return Taken(num_tokens=num_tokens, wall_s=engine.times.step_s, cpu_s=time.process_time() - started)
