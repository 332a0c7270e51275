"""What drafts from history are worth on a real model: tokens per step on grouped rollouts over epochs.

    python -m benchmarks.evidence drafts history

SmolLM2 (`examples/smollm2.py` says how to get it) writes worked arithmetic, 8 siblings a prompt, two epochs.
Steps are counted, not timed: what a step costs depends on the machine, how many it takes does not.
"""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.rows import Row
from benchmarks.workload import SMOLLM2
from blockroll.bench.prompts import worked_prompts
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.drafters.history import HistoryDrafts
from blockroll.types import Plan, Request, Rollout, Sampling

NUM_DRAFTS = 16
MAX_TOKENS = 64
SIBLINGS = 8
TEMPERATURES = (0.7, 1.0)
EPOCHS = 2


def groups(
    texts: list[tuple[int, ...]], sampling: Sampling, epoch: int, *, siblings: int
) -> Iterator[Request]:
    """The requests of an epoch, siblings behind one another; no seed comes twice."""
    for index, text in enumerate(texts):
        for sample in range(siblings):
            yield Request(
                request_id=f"{epoch}-{index}-{sample}",
                prompt_ids=text,
                seed=(epoch << 48) + (index << 24) + sample,
                sampling=sampling,
                group_id=f"{epoch}-{index}",
            )


def drain(engine: Engine, requests: list[Request]) -> list[Rollout]:
    """All of their rollouts."""
    engine.submit(requests)
    finished: list[Rollout] = []
    while engine.num_requests:
        finished += engine.step().finished
    return finished


def arithmetic(
    path: Path = SMOLLM2 / "policy",
    *,
    count: int = 3,
    siblings: int = SIBLINGS,
    max_tokens: int = MAX_TOKENS,
    batch: int = SIBLINGS,
    dtype: str = "bfloat16",
) -> list[Row]:
    """A row for each temperature and epoch: tokens per step, drafts and how many were accepted."""
    policy = HFPolicy.from_pretrained(path, dtype=dtype)
    texts = worked_prompts(policy, count)
    rows = []
    for temperature in TEMPERATURES:
        drafter = HistoryDrafts()
        plan = Plan(NUM_DRAFTS, drafter=drafter.name)
        engine = Engine(policy, plan=plan, max_batch_size=batch, drafters=[drafter])
        sampling = Sampling(temperature=temperature, max_tokens=max_tokens)
        for epoch in range(1, EPOCHS + 1):
            finished = drain(engine, [*groups(texts, sampling, epoch, siblings=siblings)])
            num_tokens = sum(len(rollout.token_ids) for rollout in finished)
            num_steps = sum(rollout.stats.num_forwards for rollout in finished)
            num_drafted = sum(rollout.stats.num_drafted for rollout in finished)
            entropy = -sum(sum(rollout.policy_logprobs) for rollout in finished) / num_tokens
            rows.append(
                {
                    "plan": plan.name,
                    "policy": str(path),
                    "dtype": dtype,
                    "temperature": temperature,
                    "epoch": epoch,
                    "prompts": count,
                    "siblings": siblings,
                    "batch": batch,
                    "max_tokens": max_tokens,
                    "tokens": num_tokens,
                    "steps": num_steps,
                    "tokens_per_step": num_tokens / num_steps,
                    "drafts_per_step": num_drafted / num_steps,
                    "acceptance_rate": sum(rollout.stats.num_accepted for rollout in finished)
                    / max(1, num_drafted),
                    "nats_per_token": entropy,
                }
            )
    return rows
