"""The sampler's share of a step of SmolLM2-135M: every plan, with and without truncation; one thread.

    python -m benchmarks.sampler               every cell that has no row yet
    python -m benchmarks.sampler --minutes 5   as many of them as are begun by then

A share is seconds in the sampler over seconds of the same steps (`engine.times`): what else the machine does
slows both. Worked arithmetic, siblings of a prompt beside one another; prefill is left out, and so is a first
wave. Rows are kept under runs/evidence/speed_sampler as they come, by commit of the package, and go to
benchmarks/results/speed_sampler.jsonl once all are there.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import rows
from benchmarks.history import drain
from benchmarks.rows import Row
from benchmarks.workload import RUNS, SMOLLM2, one_thread, working_dtype
from blockroll.bench.prompts import worked_prompts
from blockroll.config import DraftConfig
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.draft_trainer import DraftTrainer
from blockroll.rollout.drafters.engine import Engine
from blockroll.types import HISTORY, MASK_ROWS, PLAIN, Law, Plan, Request, Sampling

RESULT = "speed_sampler"
FOLDER = RUNS / RESULT
WAVES = 5
TOKENS = 16
SIBLINGS = 8
BATCHES = (1, 8, 32)
K = 4
PLANS = (PLAIN, Plan(8, drafter=HISTORY), Plan(K), Plan(K, (0, K)))
MIXED = 0.5
SAMPLINGS: tuple[Row, ...] = (
    {},
    {"temperature": 0.7},
    {"top_k": 50},
    {"top_p": 0.95},
    {"min_p": 0.05},
    {"top_k": 50, "top_p": 0.95, "min_p": 0.05},
    {"repetition_penalty": 1.1},
)
MIXED_SAMPLINGS: tuple[Row, ...] = ({}, {"repetition_penalty": 1.1})


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What one row measures."""

    plan: Plan
    batch: int
    law: Law
    options: Row

    @property
    def about(self) -> Row:
        """Its part of the row that tells it from others."""
        return {
            "plan": self.plan.name,
            "batch": self.batch,
            "law": self.law.name,
            "sampling": self.options,
        }


def cells(
    batches: Sequence[int] = BATCHES, plans: Sequence[Plan] = PLANS, samplings: Sequence[Row] = SAMPLINGS
) -> Iterator[Cell]:
    """Every plan with every option under the target law; those of mask rows under a mixed one as well."""
    for batch, options, plan in itertools.product(batches, samplings, plans):
        yield Cell(plan=plan, batch=batch, law=Law(), options=options)
    mixable = [plan for plan in plans if plan.drafter == MASK_ROWS]
    for batch, options, plan in itertools.product(batches, MIXED_SAMPLINGS, mixable):
        yield Cell(plan=plan, batch=batch, law=Law(MIXED), options=options)


def measured(policy: HFPolicy, cell: Cell, *, waves: int = WAVES, tokens: int = TOKENS) -> Row:
    """Median share of all waves, with the least and the largest; milliseconds are of one step."""
    engine = Engine(policy, plan=cell.plan, max_batch_size=cell.batch)
    sampling = Sampling(max_tokens=tokens, ignore_eos=True, law=cell.law, **cell.options)
    texts = worked_prompts(policy, -(-cell.batch // SIBLINGS))
    shares, step_ms, sampler_ms, forward_ms = [], [], [], []
    for wave in range(waves + 1):
        before = (engine.times.num_steps, engine.times.step_s, engine.times.sampler_s, engine.times.forward_s)
        drain(engine, list(_wave(texts, cell.batch, sampling, wave)))
        after = (engine.times.num_steps, engine.times.step_s, engine.times.sampler_s, engine.times.forward_s)
        num_steps, step_s, sampler_s, forward_s = (new - old for new, old in zip(after, before, strict=True))
        shares.append(sampler_s / step_s)
        step_ms.append(1e3 * step_s / num_steps)
        sampler_ms.append(1e3 * sampler_s / num_steps)
        forward_ms.append(1e3 * forward_s / num_steps)
    return {
        "what": "the sampler's share of a step",
        "policy": "SmolLM2-135M",
        "dtype": str(policy.kv_shape.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        **cell.about,
        "waves": waves,
        "tokens": tokens,
        "share": statistics.median(shares[1:]),
        "share_low": min(shares[1:]),
        "share_high": max(shares[1:]),
        "step_ms": statistics.median(step_ms[1:]),
        "forward_ms": statistics.median(forward_ms[1:]),
        "sampler_ms": statistics.median(sampler_ms[1:]),
    }


def _wave(texts: Sequence[tuple[int, ...]], batch: int, sampling: Sampling, wave: int) -> Iterator[Request]:
    """So many requests, siblings behind one another; no seed comes twice."""
    for index in range(batch):
        group = index // SIBLINGS
        yield Request(
            request_id=f"{wave}-{index}",
            prompt_ids=texts[group],
            seed=(wave << 32) + index,
            sampling=sampling,
            group_id=f"{wave}-{group}",
        )


def drafting(path: str | Path, num_drafts: int, *, dtype: str | None = None) -> HFPolicy:
    """A policy with an adapter that has learned nothing, unless it drafts already."""
    policy = HFPolicy.from_pretrained(path, **({} if dtype is None else {"dtype": dtype}))
    if policy.mask_token_id is None:
        DraftTrainer(policy, DraftConfig(block_sizes=(num_drafts,)))
    return policy


def run(
    policy: HFPolicy,
    wanted: Sequence[Cell],
    path: Path,
    *,
    minutes: float,
    waves: int = WAVES,
    tokens: int = TOKENS,
) -> list[Row]:
    """All rows so far; what the file has already is not measured again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    deadline = time.monotonic() + 60 * minutes
    for cell in wanted:
        if any(cell.about.items() <= row.items() for row in done):
            continue
        if time.monotonic() > deadline:
            break
        row = measured(policy, cell, waves=waves, tokens=tokens)
        done.append(row)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            *cell.about.values(),
            f"{row['share']:.1%} ({row['share_low']:.1%} to {row['share_high']:.1%})",
            flush=True,
        )
    return done


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the rows once all are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="begin no row after so long")
    given = parser.parse_args(arguments)
    from examples.smollm2 import checkpoint

    wanted = [*cells()]
    with one_thread():
        policy = drafting(checkpoint(SMOLLM2 / "policy"), K, dtype=working_dtype())
        path = FOLDER / f"{rows.last_commit('blockroll')}.jsonl"
        found = run(policy, wanted, path, minutes=given.minutes)
    if len(found) < len(wanted):
        print(f"{len(found)} of {len(wanted)} measured, time is over: run it again to go on")
    else:
        rows.write(RESULT, found)


if __name__ == "__main__":
    main()
