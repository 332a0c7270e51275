"""Plain decoding of SmolLM2-135M: ordinary weights, packed ones, and transformers; one process, one thread.

    python -m benchmarks.plain               both types at batch 1, 8 and 32
    python -m benchmarks.plain --minutes 5   as many of these as are begun by then

A pair is the same prompts decoded to the same length by each, one directly after the other, who comes first
going round: what else the machine does slows all alike. Times are of the processor (`time.process_time`), of
decode steps alone: prefill and the first step are left out on each side. Rows go to
benchmarks/results/speed_plain.jsonl.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import LogitsProcessorList

from benchmarks import rows
from benchmarks.rows import Row
from benchmarks.workload import SMOLLM2, one_thread
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.drafters.engine import Engine
from blockroll.types import PLAIN, Request, Sampling

RESULT = "speed_plain"
PAIRS = 5
PROMPT, TOKENS = 64, 16
BATCHES = (1, 8, 32)


def engine_step_s(policy: HFPolicy, prompts: Sequence[tuple[int, ...]], tokens: int, seed: int) -> float:
    """Processor seconds of one decode step of our engine."""
    engine = Engine(policy, plan=PLAIN, max_batch_size=len(prompts))
    sampling = Sampling(max_tokens=tokens, ignore_eos=True)
    engine.submit(
        Request(request_id=str(index), prompt_ids=prompt, seed=(seed << 32) + index, sampling=sampling)
        for index, prompt in enumerate(prompts)
    )
    engine.step()
    started = time.process_time()
    while engine.num_requests:
        engine.step()
    return (time.process_time() - started) / (tokens - 1)


def generate_step_s(policy: HFPolicy, prompts: Sequence[tuple[int, ...]], tokens: int) -> float:
    """Processor seconds of one decode step of transformers' `generate`, with its own attention and cache."""
    model: Any = policy.model
    at: list[float] = []

    def clock(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at.append(time.process_time())
        return scores

    ids_BT = torch.tensor(prompts)
    own = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=True,
            top_k=0,
            logits_processor=LogitsProcessorList([clock]),
            pad_token_id=0,
        )
    finally:
        model.set_attn_implementation(own)
    return (at[-1] - at[0]) / (tokens - 1)


def measured(
    ordinary: HFPolicy, packed: HFPolicy, *, batch: int, pairs: int = PAIRS, tokens: int = TOKENS
) -> Row:
    """Medians of each, and the ratios of every pair: below 1 is faster. A first pair is not counted."""
    seconds: dict[str, list[float]] = {"ordinary": [], "packed": [], "generate": []}
    for pair in range(pairs + 1):
        generator = torch.Generator().manual_seed(pair)
        prompts = [
            tuple(torch.randint(4, ordinary.vocab_size, (PROMPT,), generator=generator).tolist())
            for _ in range(batch)
        ]
        turns: list[tuple[str, Callable[[], float]]] = [
            ("ordinary", partial(engine_step_s, ordinary, prompts, tokens, pair)),
            ("packed", partial(engine_step_s, packed, prompts, tokens, pair)),
            ("generate", partial(generate_step_s, ordinary, prompts, tokens)),
        ]
        for index in range(len(turns)):
            name, work = turns[(pair + index) % len(turns)]
            seconds[name].append(work())
    kept = {name: each[1:] for name, each in seconds.items()}

    def ratios(name: str, against: str) -> Row:
        found = [mine / theirs for mine, theirs in zip(kept[name], kept[against], strict=True)]
        key = f"{name}_to_{against}"
        return {key: statistics.median(found), f"{key}_low": min(found), f"{key}_high": max(found)}

    return {
        "what": "a plain decode step",
        "policy": "SmolLM2-135M",
        "dtype": str(ordinary.model.dtype).removeprefix("torch."),
        "batch": batch,
        "context": [PROMPT, PROMPT + tokens],
        "threads": torch.get_num_threads(),
        "pairs": pairs,
        **{f"{name}_cpu_ms": 1e3 * statistics.median(each) for name, each in kept.items()},
        **ratios("packed", "ordinary"),
        **ratios("packed", "generate"),
        **ratios("ordinary", "generate"),
        "packed_mb": packed.packed.num_bytes / 1e6,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="begin no row after so long")
    given = parser.parse_args(arguments)
    from examples.smollm2 import checkpoint

    folder = checkpoint(SMOLLM2 / "policy")
    deadline = time.monotonic() + 60 * given.minutes
    found: list[Row] = []
    with one_thread():
        for dtype in ("bfloat16", "float32"):
            ordinary, packed = (
                HFPolicy.from_pretrained(folder, dtype=dtype, prepack=prepack) for prepack in ("off", "auto")
            )
            for batch in BATCHES:
                if time.monotonic() < deadline:
                    found.append(measured(ordinary, packed, batch=batch))
                    print(found[-1], flush=True)
    rows.write(RESULT, found)


if __name__ == "__main__":
    main()
