"""Speed against plain decoding and transformers, in one run, on one thread."""

from collections.abc import Callable
from functools import partial

from benchmarks import peers
from benchmarks.grid import grid
from benchmarks.grouped import grouped
from benchmarks.longtail import longtail
from benchmarks.pages import pages
from benchmarks.rows import Row
from benchmarks.workload import (
    SMOLLM2,
    TWO_FORWARD,
    one_thread,
    prompts,
)
from blockroll.bench.bench import BenchOptions, run_bench, to_record
from blockroll.policies.hf import HFPolicy
from blockroll.types import PLAIN


def drafted_speed(
    policy: HFPolicy, *, batches: tuple[int, ...] = (1, 4, 16, 64), repeats: int = 7
) -> list[Row]:
    """Plain, two-forward and transformers' generate, alternating in one run; one thread."""
    with one_thread():
        options = BenchOptions(batches=batches, repeats=repeats, rollouts=16, max_tokens=(64,))
        rows = run_bench(
            policy,
            prompts(policy, 128, seed=7),
            [PLAIN, TWO_FORWARD],
            options,
            policy_path="tiny",
            against=("generate",),
        )
    return [to_record(row) for row in rows]


def experiments() -> dict[str, Callable[[], list[Row]]]:
    """Every experiment by the name of its result file."""
    found: dict[str, Callable[[], list[Row]]] = {
        "drafts": partial(drafted_speed, HFPolicy.from_pretrained("tiny")),
        "grid": grid,
        "longtail": longtail,
        "pages": pages,
    }
    if (SMOLLM2 / "policy" / "config.json").is_file():
        found["grouped"] = grouped
    else:
        print(f"speed: grouped is left out: no {SMOLLM2 / 'policy'}; run examples/smollm2.py first")
    if (reason := peers.missing()) is not None:
        print(f"speed: peers is left out: {reason}")
    else:
        found |= {
            "peers": peers.peers,
            "peers_avx512": peers.peers,  # where AVX-512 multiplies in bfloat16, without a matrix unit
            "peers_float32": peers.peers_float32,
            "peers_two_threads": peers.peers_two_threads,
        }
    return found
