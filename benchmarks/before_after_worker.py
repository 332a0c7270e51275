"""One checkout of the package, in an interpreter of its own: measures what it is asked, a JSON line each.

Started by benchmarks/before_after.py with the checkout on PYTHONPATH. It uses public names alone, so that old
and new checkouts run the same code.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import blockroll
from blockroll import Engine, HFPolicy, Plan, Request, Sampling

Answer = dict[str, Any]
PLAIN = Plan.parse("plain", default_drafts=8)


@lru_cache
def policy_at(path: str, adapter: str | None) -> HFPolicy:
    """Loaded once."""
    return HFPolicy.from_pretrained(path, adapter=adapter) if adapter else HFPolicy.from_pretrained(path)


@lru_cache
def long_policy(positions: int) -> HFPolicy:
    """Random weights for texts that the tiny policy has no room for, with its tokenizer of bytes."""
    torch.manual_seed(0)
    folder = Path(blockroll.__file__).parent / "policies" / "tiny_policy"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return HFPolicy(LlamaForCausalLM(config).eval(), tokenizer)


def decode(
    *, path: str, adapter: str | None, plan: str, batch: int, rollouts: int, max_tokens: int, seed: int
) -> Answer:
    """Seconds per token of so many rollouts, prefill included."""
    policy = policy_at(path, adapter)
    engine = Engine(policy, plan=Plan.parse(plan, default_drafts=8), max_batch_size=batch, max_length=256)
    prompts = [
        tuple(policy.tokenizer(f"{index + 12}*{index % 7 + 3}-8=?\n")["input_ids"])
        for index in range(rollouts)
    ]
    sampling = Sampling(max_tokens=max_tokens, ignore_eos=True)
    requests = [
        Request(request_id=str(index), prompt_ids=prompt, seed=(seed << 32) + index, sampling=sampling)
        for index, prompt in enumerate(prompts)
    ]
    start = time.perf_counter()
    engine.submit(requests)
    num_tokens = sum(len(rollout.token_ids) for rollout in drained(engine))
    return {"seconds": (time.perf_counter() - start) / num_tokens}


def step_parts(*, plan: str, batch: int, sampling: Answer, max_tokens: int, seed: int) -> Answer:
    """Milliseconds of the processor in a step of the tiny policy, with the host's and the sampler's."""
    policy = policy_at("tiny", None)
    options = Sampling(max_tokens=max_tokens, ignore_eos=True, **sampling)
    engine = Engine(
        policy,
        plan=Plan.parse(plan, default_drafts=8),
        max_batch_size=batch,
        max_length=256,
        clock=time.process_time,
    )
    requests = [
        Request(
            request_id=str(index),
            prompt_ids=tuple(policy.tokenizer(f"{index + 12}*{index % 7 + 3}-8=?\n")["input_ids"]),
            seed=(seed << 32) + index,
            sampling=options,
        )
        for index in range(batch)
    ]
    engine.submit(requests)
    engine.step()
    engine.reset_times()
    drained(engine)
    times = engine.times
    host_s = times.step_s - times.forward_s - times.sampler_s
    parts = {"host": host_s, "sampler": times.sampler_s, "step": times.step_s}
    return {f"{part}_ms": 1e3 * seconds / times.num_steps for part, seconds in parts.items()}


def admission(*, texts: int, length: int, seed: int) -> Answer:
    """Seconds until so many texts have their first tokens, twice: the second time each goes on from a first.

    Half of them begin alike.
    """
    policy = policy_at("tiny", None)
    engine = Engine(
        policy, plan=Plan.parse("plain", default_drafts=8), max_batch_size=texts, max_length=2 * length
    )
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(4, 250, (length // 2,), generator=generator).tolist()
    prompts = []
    for index in range(texts):
        own = torch.randint(4, 250, (length,), generator=generator).tolist()
        prompts.append((*shared, *own[length // 2 :]) if index % 2 else tuple(own))
    seconds = 0.0
    for turn in range(2):
        sampling = Sampling(max_tokens=4, ignore_eos=True)
        requests = [
            Request(
                request_id=f"{turn}-{index}", prompt_ids=(*prompt, *[9] * turn), seed=index, sampling=sampling
            )
            for index, prompt in enumerate(prompts)
        ]
        start = time.perf_counter()
        engine.submit(requests)
        engine.step()
        seconds += time.perf_counter() - start
        drained(engine)
    return {"seconds": seconds}


def stop_strings(*, tokens: int, seed: int) -> Answer:
    """Seconds of one text of so many tokens, with stop strings that never come."""
    policy = long_policy(tokens + 64)
    engine = Engine(
        policy, plan=Plan.parse("plain", default_drafts=8), max_batch_size=1, decode=policy.decode
    )
    sampling = Sampling(max_tokens=tokens, ignore_eos=True, stop=("never comes", "nor does this"))
    start = time.perf_counter()
    engine.submit([Request(request_id="long", prompt_ids=(5, 6, 7), seed=seed, sampling=sampling)])
    (rollout,) = drained(engine)
    assert len(rollout.token_ids) == tokens, rollout.finish_reason
    return {"seconds": time.perf_counter() - start}


def prompts_file(*, path: str, asked: int, seed: int) -> Answer:
    """Seconds to read a file of prompts and to take so many of them in a seed's order."""
    from blockroll.rl_loops.prompts import load_prompts

    policy = policy_at("tiny", None)
    start = time.perf_counter()
    prompts = load_prompts(path, policy, {})
    drawn = {prompts.token_ids(seed, index) for index in range(asked)}
    seconds = time.perf_counter() - start
    assert len(drawn) == asked
    return {"seconds": seconds}


def untrained_adapter(*, path: str, out: str, num_drafts: int) -> Answer:
    """An adapter that has learned nothing, for a policy that was never taught to draft."""
    from blockroll import DraftTrainer
    from blockroll.config import DraftConfig

    policy = HFPolicy.from_pretrained(path)
    DraftTrainer(policy, DraftConfig(block_sizes=(num_drafts,)))
    assert policy.adapter is not None
    policy.adapter.save_pretrained(Path(out))
    return {"seconds": 0.0}


def drained(engine: Engine) -> list[Any]:
    """Everything that an engine still has to finish."""
    finished: list[Any] = []
    while engine.num_requests:
        finished += engine.step().finished
    return finished


MEASURES: dict[str, Callable[..., Answer]] = {
    measure.__name__: measure
    for measure in (decode, step_parts, admission, stop_strings, prompts_file, untrained_adapter)
}


def main() -> None:
    """Answer each line of standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(1)
    print(json.dumps({"package": str(Path(blockroll.__file__).parent)}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(MEASURES[asked.pop("measure")](**asked)), file=answers, flush=True)


if __name__ == "__main__":
    main()
