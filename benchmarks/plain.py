"""Plain decoding: ours with compiled layers, with packed weights alone, and transformers' `generate`.

    python -m benchmarks.plain                                every cell that this commit has no row of
    python -m benchmarks.plain --policy SmolLM2-135M --dtype bfloat16 --threads 1 --batch 1,8,32
    python -m benchmarks.plain --minutes 5                    as many of these as are begun by then

A pair is the same prompts decoded to the same length by each, one directly after the other, who comes first
going round: what else the machine does slows all alike. Times are of decode steps alone: prefill and the
first step are left out on each side. With one thread ratios are of processor time, with more of wall time.
Beside them stands the floor: the time of reading every weight of a step once, by a plain sum over memory in
this process, in turns with the others. Rows go to benchmarks/results/speed_plain.jsonl, one after each cell.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessorList, PreTrainedModel

from benchmarks import rows, workload
from benchmarks.rows import Row
from blockroll.policies.hf import HFPolicy
from blockroll.policies.loading import load_model
from blockroll.rollout.drafters.engine import Engine
from blockroll.types import PLAIN, Request, Sampling

RESULT = "speed_plain"
CELL = ("policy", "dtype", "threads", "batch")
PAIRS = 5
PROMPT, TOKENS = 64, 16
BATCHES = (1, 8, 32)
DTYPES = ("bfloat16", "float32")
THREADS = (1, 2)
# Random weights: speed does not depend on them. The shapes of small models of each kind.
RANDOM = {
    "Gemma-type": {
        "model_type": "gemma3_text",
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 65536,
        "sliding_window": 512,
    },
    "small Llama": {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
}
POLICIES = ("SmolLM2-135M", *RANDOM)

Times = tuple[float, float]  # seconds of the processor and of the wall


def now() -> Times:
    """Both clocks."""
    return time.process_time(), time.perf_counter()


def per_step(start: Times, end: Times, steps: int) -> Times:
    """Of one of so many steps."""
    return (end[0] - start[0]) / steps, (end[1] - start[1]) / steps


def engine_step_s(policy: HFPolicy, prompts: Sequence[tuple[int, ...]], tokens: int, seed: int) -> Times:
    """Seconds of one decode step of our engine."""
    engine = Engine(policy, plan=PLAIN, max_batch_size=len(prompts))
    sampling = Sampling(max_tokens=tokens, ignore_eos=True)
    engine.submit(
        Request(request_id=str(index), prompt_ids=prompt, seed=(seed << 32) + index, sampling=sampling)
        for index, prompt in enumerate(prompts)
    )
    engine.step()
    started = now()
    while engine.num_requests:
        engine.step()
    return per_step(started, now(), tokens - 1)


def generate_step_s(policy: HFPolicy, prompts: Sequence[tuple[int, ...]], tokens: int) -> Times:
    """Seconds of one decode step of transformers' `generate`, with its own attention and cache."""
    model: Any = policy.model
    at: list[Times] = []

    def clock(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at.append(now())
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
    return per_step(at[0], at[-1], tokens - 1)


def floor_s(policy: HFPolicy, memory: torch.Tensor) -> Times:
    """Seconds of reading as many bytes as a step's weights have, once."""
    model: Any = policy.model
    weights = {each.data_ptr(): each.nbytes for each in model.parameters()}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding is not head:
        del weights[embedding.data_ptr()]  # of it a step reads a few rows
    started = now()
    memory.sum()
    spent = per_step(started, now(), 1)
    share = sum(weights.values()) / memory.nbytes
    return spent[0] * share, spent[1] * share


def measured(
    compiled: HFPolicy, packed: HFPolicy, *, name: str, batch: int, pairs: int = PAIRS, tokens: int = TOKENS
) -> Row:
    """Medians of each, and the ratios of every pair: below 1 is faster. A first pair is not counted."""
    threads = torch.get_num_threads()
    memory = torch.ones(1 << 26)  # more than a processor's cache holds
    times: dict[str, list[Times]] = {"compiled": [], "packed": [], "generate": [], "floor": []}
    for pair in range(pairs + 1):
        generator = torch.Generator().manual_seed(pair)
        prompts = [
            tuple(torch.randint(4, compiled.vocab_size, (PROMPT,), generator=generator).tolist())
            for _ in range(batch)
        ]
        turns: list[tuple[str, Callable[[], Times]]] = [
            ("compiled", partial(engine_step_s, compiled, prompts, tokens, pair)),
            ("packed", partial(engine_step_s, packed, prompts, tokens, pair)),
            ("generate", partial(generate_step_s, packed, prompts, tokens)),
            ("floor", partial(floor_s, compiled, memory)),
        ]
        for index in range(len(turns)):
            what, work = turns[(pair + index) % len(turns)]
            times[what].append(work())
    clock = 0 if threads == 1 else 1  # processor time of several threads holds their waiting
    kept = {what: [each[clock] for each in found[1:]] for what, found in times.items()}

    def ratios(what: str, against: str) -> Row:
        found = [mine / theirs for mine, theirs in zip(kept[what], kept[against], strict=True)]
        key = f"{what}_to_{against}"
        return {key: statistics.median(found), f"{key}_low": min(found), f"{key}_high": max(found)}

    return {
        "what": "a plain decode step",
        "policy": name,
        "dtype": str(compiled.model.dtype).removeprefix("torch."),
        "threads": threads,
        "batch": batch,
        "context": [PROMPT, PROMPT + tokens],
        "pairs": pairs,
        **{
            f"{what}_{unit}_ms": 1e3 * statistics.median(each[index] for each in found[1:])
            for what, found in times.items()
            for index, unit in enumerate(("cpu", "wall"))
        },
        **ratios("compiled", "generate"),
        **ratios("compiled", "packed"),
        **ratios("compiled", "floor"),
        "compiled_most_rows": compiled.compiled.most_rows,
        "packed_mb": packed.packed.num_bytes / 1e6,
    }


def model(name: str, dtype: str) -> PreTrainedModel:
    """One of `POLICIES`; SmolLM2 is unpacked on first use."""
    if name not in RANDOM:
        from examples.smollm2 import checkpoint

        return load_model(checkpoint(workload.SMOLLM2 / "policy"), dtype=dtype)
    torch.manual_seed(0)
    options = dict(RANDOM[name])
    config = AutoConfig.for_model(**options, max_position_embeddings=2048, tie_word_embeddings=True)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return made.eval()


def is_measured(cell: Row) -> bool:
    """Whether this state of the package has a row of a cell already."""
    commit = rows.provenance()["package_commit"]
    found = rows.read(RESULT) if rows.has_rows(RESULT) else []
    return any(
        row["package_commit"] == commit and "+" not in (commit or "+") and cell.items() <= row.items()
        for row in found
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=240, help="begin no cell after so long")
    parser.add_argument("--policy", default=",".join(POLICIES), help=", ".join(POLICIES))
    parser.add_argument("--dtype", default=",".join(DTYPES), help=", ".join(DTYPES))
    parser.add_argument("--threads", default=",".join(map(str, THREADS)))
    parser.add_argument("--batch", default=",".join(map(str, BATCHES)))
    parser.add_argument("--pairs", type=int, default=PAIRS)
    given = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * given.minutes
    batches = [int(each) for each in given.batch.split(",")]
    for name in given.policy.split(","):
        for dtype in given.dtype.split(","):
            for threads in (int(each) for each in given.threads.split(",")):
                cells: list[Row] = [
                    {"policy": name, "dtype": dtype, "threads": threads, "batch": batch} for batch in batches
                ]
                wanted = [cell for cell in cells if not is_measured(cell)]
                if not wanted or time.monotonic() >= deadline:
                    continue
                with workload.threads(threads):
                    compiled = HFPolicy(model(name, dtype))
                    packed = HFPolicy(model(name, dtype), compile="off")
                    for cell in wanted:
                        if time.monotonic() < deadline:
                            row = measured(
                                compiled, packed, name=name, batch=cell["batch"], pairs=given.pairs
                            )
                            print(row, flush=True)
                            rows.put(RESULT, row, same=CELL)


if __name__ == "__main__":
    main()
