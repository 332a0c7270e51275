"""Kernels on this machine's GPU, in turns with what torch has, beside what the GPU can do.

    make gpu                        tests that need a GPU, and then these
    python -m benchmarks.gpu        these alone; needs torch, triton and transformers

What a kernel must move at least, over the time it takes, is a share of the bandwidth of a copy that is
measured beside it. Times are medians of calls in turns, by the GPU's own events. Rows bear the name of the
device, and go to benchmarks/results/kernels_gpu.jsonl. A case whose tensors have no room is left out by name.

Shapes: B requests, H query heads, G key heads, R rows, D head width, K drafts, V vocabulary.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import rows
from benchmarks.gpu_engines import EngineSizes, engines
from benchmarks.rows import Row
from blockroll.config import TrainConfig
from blockroll.kernels.block_attention import RowLayout, block_attention
from blockroll.kernels.block_verify import verify_block
from blockroll.kernels.choice import Form, choose, using
from blockroll.kernels.draft_draw import draw_draft
from blockroll.kernels.lowrank_linear import lowrank_linear
from blockroll.kernels.pages import Pages
from blockroll.kernels.rows import Cut, LogitRows
from blockroll.kernels.selective_logprob import OutputHead, selective_logprob

RESULT = "kernels_gpu"
REPEATS = 21
WARM_UPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of the tensors that are measured."""

    copied: int = 1 << 30  # bytes
    square: int = 8192  # of a matrix product
    contexts: Sequence[int] = (4096, 16384, 32768)
    batches: Sequence[int] = (8, 32, 64)
    heads: tuple[int, int, int] = (32, 8, 128)  # H, G, D
    num_drafts: int = 8
    page_size: int = 16
    vocab_size: int = 151_936
    verified: Sequence[int] = (1, 8, 64, 256)  # requests
    trained_tokens: int = 4096
    hidden: int = 2048
    engines: EngineSizes = field(default_factory=EngineSizes)


SMALL = Sizes(
    copied=1 << 12,
    square=16,
    contexts=(40,),
    batches=(2,),
    heads=(4, 2, 32),
    num_drafts=2,
    vocab_size=300,
    verified=(2,),
    trained_tokens=4,
    hidden=32,
    engines=EngineSizes(
        batches=(2,),
        prompt=5,
        tokens=4,
        dtype=torch.float32,
        kernels="triton",
        shape={
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "vocab_size": 64,
        },
    ),
)

Run = Callable[[], object]


def in_turns(runs: Mapping[str, Run], device: torch.device, repeats: int = REPEATS) -> dict[str, float]:
    """Median seconds of each, called one after another, so that what slows one slows all."""
    for run in runs.values():
        for _ in range(WARM_UPS if device.type == "cuda" else 1):
            run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            taken[name].append(_seconds(run, device))
    return {name: statistics.median(each) for name, each in taken.items()}


def _seconds(run: Run, device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@dataclass(frozen=True, slots=True)
class Roof:
    """What the device was seen to do."""

    bytes_per_s: float  # of a copy, read and written
    flops_per_s: float  # of a product in bfloat16


def roof(sizes: Sizes, device: torch.device, repeats: int) -> Roof:
    """Of a copy and of a matrix product."""
    source = torch.empty(sizes.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    one = torch.randn((sizes.square, sizes.square), device=device).bfloat16()
    runs: dict[str, Run] = {"copy": lambda: target.copy_(source), "product": lambda: one @ one}
    took = in_turns(runs, device, repeats)
    return Roof(2 * sizes.copied / took["copy"], 2 * sizes.square**3 / took["product"])


def attention(sizes: Sizes, device: torch.device, roof: Roof, repeats: int) -> Iterator[Row]:
    """Over pages, against torch's over the same keys in one piece, under a mask of rows and keys."""
    heads, key_heads, width = sizes.heads
    num_clean = sizes.num_drafts + 1
    layouts = {
        "plain": RowLayout(num_clean=1),
        "verify": RowLayout(num_clean=num_clean),
        "fused": RowLayout(num_clean=num_clean, width=num_clean, levels=(sizes.num_drafts,)),
    }
    for context, batch in itertools.product(sizes.contexts, sizes.batches):
        num_pages = -(-context // sizes.page_size)
        table_BT = torch.randperm(batch * num_pages, device=device).view(batch, num_pages) + 1
        shape = (batch * num_pages + 1, key_heads, sizes.page_size, width)
        held = [torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2)]
        pages = Pages(keys_NGZD=held[0], values_NGZD=held[1], table_BT=table_BT)
        lengths_B = torch.full((batch,), context, device=device)
        prefix = [each[table_BT].transpose(1, 2).flatten(2, 3)[:, :, :context] for each in held]
        for name, layout in layouts.items():
            shapes = [(batch, each, layout.num_rows, width) for each in (heads, key_heads, key_heads)]
            query, *new = (torch.randn(each, dtype=torch.bfloat16, device=device) for each in shapes)
            keys, values = (torch.cat(pair, dim=2) for pair in zip(prefix, new, strict=True))
            mask = layout.mask(lengths_B, keys.shape[2])

            def by_torch(query: Tensor = query, keys=keys, values=values, mask=mask) -> Tensor:
                return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)

            def ours(query: Tensor = query, new=new, layout=layout, pages=pages, lengths=lengths_B) -> Tensor:
                with using("triton"):
                    return block_attention(query, *new, pages, layout, lengths)

            gap = (ours().transpose(1, 2).float() - by_torch().float()).abs().max().item()
            took = in_turns({"ours": ours, "torch": by_torch}, device, repeats)
            least = 2 * batch * key_heads * width * 2 * (context + layout.num_rows)
            yield {
                "op": "block_attention",
                "case": name,
                "context": context,
                "batch": batch,
                "heads": [*sizes.heads],
                "ours_s": took["ours"],
                "torch_s": took["torch"],
                "over_torch": took["torch"] / took["ours"],
                "share_of_copy": least / took["ours"] / roof.bytes_per_s,
                "largest_gap": gap,
            }


def verification(sizes: Sizes, device: torch.device, roof: Roof, repeats: int) -> Iterator[Row]:
    """Drafts that were drawn, against the definition in torch, over one read of the target's logits."""
    num_drafts, vocab_size = sizes.num_drafts, sizes.vocab_size
    for batch, case in itertools.product(sizes.verified, ("whole", "top_p")):
        shape = (batch, num_drafts + 1, vocab_size)
        target_BLV = torch.randn(shape, device=device) * 2
        draft_BKV = target_BLV[:, :-1] + torch.randn_like(target_BLV[:, :-1]) / 2
        temperature_B = torch.full((batch,), 0.9, dtype=torch.float64, device=device)
        coins = torch.rand((batch, 2 * num_drafts + 1), dtype=torch.float64, device=device)
        off_B = torch.zeros(batch, dtype=torch.float64, device=device)
        cut = Cut(off_B, off_B + 0.95, off_B, is_everywhere=True) if case == "top_p" else None

        def step(
            form: str, target=target_BLV, draft=draft_BKV, scale=temperature_B, coins=coins, cut=cut
        ) -> object:
            with using(form):
                drafted = draw_draft(draft, scale, coins[:, :num_drafts], cut=cut, certain=False)
                rows = LogitRows(target, scale, False, cut)
                return verify_block(drafted, rows, coins[:, num_drafts:])

        runs: dict[str, Run] = {
            "ours": lambda step=step: step("triton"),
            "torch": lambda step=step: step("reference"),
        }
        took = in_turns(runs, device, repeats)
        read_s = (target_BLV.nbytes + draft_BKV.nbytes) / roof.bytes_per_s
        yield {
            "op": "block_verify and draft_draw",
            "case": case,
            "batch": batch,
            "num_drafts": num_drafts,
            "vocab_size": vocab_size,
            "ours_s": took["ours"],
            "torch_s": took["torch"],
            "over_torch": took["torch"] / took["ours"],
            "over_one_read": took["ours"] / read_s,
        }


def learning(sizes: Sizes, device: torch.device, roof: Roof, repeats: int) -> Iterator[Row]:
    """Log-probabilities of tokens and their gradient in bounded memory, against logits of all of them."""
    num_tokens, width = sizes.trained_tokens, sizes.hidden
    states = torch.randn((num_tokens, width), dtype=torch.bfloat16, device=device, requires_grad=True)
    weight = torch.randn((sizes.vocab_size, width), dtype=torch.bfloat16, device=device) * width**-0.5
    head = OutputHead(weight_VW=weight.requires_grad_())
    tokens_N = torch.randint(sizes.vocab_size, (num_tokens,), device=device)
    temperature_N = torch.ones(num_tokens, device=device)

    def step(form: Form, memory_bytes: int) -> None:
        with using(form):
            laws = selective_logprob(states, head, tokens_N, temperature_N, memory_bytes=memory_bytes)
            torch.autograd.grad(laws.logprobs_N.sum(), [states, head.weight_VW])

    bound = TrainConfig().logits_memory_mb << 20
    runs: dict[str, Run] = {
        "ours": lambda: step("triton", bound),
        "torch": lambda: step("reference", 1 << 40),  # logits of all tokens at once
    }
    took = in_turns(runs, device, min(repeats, 7))
    peaks = {name: _peak(run, device) for name, run in runs.items()}
    flops = 2 * num_tokens * sizes.vocab_size * width
    yield {
        "op": "selective_logprob",
        "case": "forward and backward",
        "tokens": num_tokens,
        "vocab_size": sizes.vocab_size,
        "ours_s": took["ours"],
        "torch_s": took["torch"],
        "over_torch": took["torch"] / took["ours"],
        "share_of_product": 4 * flops / took["ours"] / roof.flops_per_s,  # logits twice, states, head
        "ours_peak_bytes": peaks["ours"],
        "torch_peak_bytes": peaks["torch"],
    }


def _peak(run: Run, device: torch.device) -> int | None:
    """Bytes that a call takes at once, besides what is there; None where nobody counts them."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return int(torch.cuda.max_memory_allocated(device) - before)


def adapter(sizes: Sizes, device: torch.device, roof: Roof, repeats: int) -> Iterator[Row]:
    """The draft adapter's update of mask rows, against products of all of torch's."""
    rank, width, out = 32, sizes.hidden, 3 * sizes.hidden
    down, up = (torch.randn(shape, device=device) * 0.02 for shape in ((rank, width), (out, rank)))
    for batch in sizes.verified:
        masks = sizes.num_drafts
        x_BRI = torch.randn((batch, 1 + masks, width), dtype=torch.bfloat16, device=device)
        base_BRO = torch.zeros((batch, 1 + masks, out), dtype=torch.bfloat16, device=device)

        def step(form: Form, base: Tensor = base_BRO, x: Tensor = x_BRI) -> None:
            with using(form), torch.no_grad():
                lowrank_linear(base, x, down, up, first_row=1)

        runs: dict[str, Run] = {"ours": partial(step, "triton"), "torch": partial(step, "reference")}
        took = in_turns(runs, device, repeats)
        moved = batch * masks * (2 * width + 4 * out) + 4 * rank * (width + out)
        yield {
            "op": "lowrank_linear",
            "case": f"rank {rank}",
            "batch": batch,
            "num_rows": batch * masks,
            "ours_s": took["ours"],
            "torch_s": took["torch"],
            "over_torch": took["torch"] / took["ours"],
            "share_of_copy": moved / took["ours"] / roof.bytes_per_s,
        }


def decoding(sizes: Sizes, device: torch.device, roof: Roof, repeats: int) -> Iterator[Row]:
    """Whole engines beside `generate`."""
    return engines(sizes.engines, device)


PARTS = {
    "attention": attention,
    "verification": verification,
    "learning": learning,
    "adapter": adapter,
    "engines": decoding,
}


def measure(parts: Sequence[str], sizes: Sizes, device: torch.device, repeats: int = REPEATS) -> list[Row]:
    """Rows of these parts, behind one of what the device can do."""
    found = roof(sizes, device, repeats)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    shared = {"device": name, "kernels": str(choose("triton", device))}
    made: list[Row] = [
        {"op": "roof", "bytes_per_s": found.bytes_per_s, "flops_per_s": found.flops_per_s, **shared}
    ]
    for part in parts:
        try:
            made += [{**row, **shared} for row in PARTS[part](sizes, device, found, repeats)]
        except torch.OutOfMemoryError as error:
            made.append({"op": part, "left_out": str(error).split(". ")[0], **shared})
    return made


def main() -> None:
    """Measure, print and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all without any")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU on this machine")
    made = measure(given.parts or [*PARTS], Sizes(), torch.device("cuda"))
    for row in made:
        print(json.dumps(row), flush=True)
    rows.write(RESULT, made)


if __name__ == "__main__":
    main()
