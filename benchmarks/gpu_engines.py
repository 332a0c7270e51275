"""Whole engines on a GPU: every plan with captured graphs, by batch, in turns with transformers' `generate`.

    python -m benchmarks.gpu engines

A model of Qwen3-1.7B's shape with random weights and a random draft adapter, and SmolLM2 where its checkpoint
is (examples/smollm2.py). Drafts of an adapter that learned nothing are seldom right: what counts is the time
of a step beside a plain one, and how many tokens a step must bring to pay.
"""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.rows import Row
from blockroll.bench.reference import generate_stock
from blockroll.kernels.choice import Kernels
from blockroll.policies.adapter import AdapterConfig, DraftAdapter
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.repeated import Graphs
from blockroll.types import PLAIN, Plan, Request, Sampling

SMOLLM2 = Path("runs") / "smollm2" / "policy"
QWEN3 = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 4096,
}
K = 8
PLANS = {"plain": PLAIN, "two_forward": Plan(K), "fused": Plan(K, (0, K // 2, K))}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSizes:
    """Of what is decoded."""

    batches: Sequence[int] = (1, 8, 32, 128, 256)
    prompt: int = 256
    tokens: int = 128
    shape: Mapping[str, Any] = field(default_factory=lambda: QWEN3)
    dtype: torch.dtype = torch.bfloat16
    kernels: Kernels = "auto"


def policies(sizes: EngineSizes, device: torch.device) -> Iterator[tuple[str, HFPolicy, Any]]:
    """Each with an adapter that acts at random, and the same weights as transformers runs them."""
    torch.manual_seed(0)
    with torch.device(device):
        config = AutoConfig.for_model("qwen3", **sizes.shape)
        model = AutoModelForCausalLM.from_config(config, dtype=sizes.dtype).eval()
    stock = copy.deepcopy(model)
    yield "random weights, Qwen3-1.7B's shape", _drafting(HFPolicy(model)), stock
    if SMOLLM2.is_dir() and device.type == "cuda":
        stock = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=sizes.dtype).to(device).eval()
        policy = HFPolicy.from_pretrained(SMOLLM2, device=device, dtype=sizes.dtype)
        yield "SmolLM2-135M", _drafting(policy), stock


def _drafting(policy: HFPolicy) -> HFPolicy:
    config = AdapterConfig(
        family=policy.model.config.model_type,
        rank=16,
        block_sizes=(K,),
        layouts=("two_forward", "fused"),
    )
    adapter = DraftAdapter(policy.model, config).to(policy.device)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.02)
    policy.use_adapter(adapter)
    return policy


def engines(sizes: EngineSizes, device: torch.device) -> Iterator[Row]:
    """Tokens a second of each plan and of `generate`, and a step's time over a plain one's."""
    for name, policy, stock in policies(sizes, device):
        for batch in sizes.batches:
            prompts = torch.randint(10, policy.vocab_size - 10, (batch, sizes.prompt)).tolist()
            found = {
                plan: _decoded(policy, PLANS[plan], prompts, sizes, graphs=_graphs(device)) for plan in PLANS
            }
            by_generate = _generated(stock, prompts, sizes, device)
            for plan, row in found.items():
                yield {
                    "op": "engine",
                    "case": name,
                    "plan": plan,
                    "batch": batch,
                    **row,
                    "step_over_plain": row["step_s"] / found["plain"]["step_s"],
                    "over_plain": row["tokens_per_s"] / found["plain"]["tokens_per_s"],
                    "over_generate": row["tokens_per_s"] / by_generate,
                }


def _graphs(device: torch.device) -> Graphs:
    return "on" if device.type == "cuda" else "off"


def _decoded(
    policy: HFPolicy, plan: Plan, prompts: Sequence[Sequence[int]], sizes: EngineSizes, *, graphs: Graphs
) -> Row:
    """Twice, because graphs are captured the first time; prefill is left out."""
    engine = Engine(
        policy,
        plan=plan,
        max_batch_size=len(prompts),
        max_length=sizes.prompt + sizes.tokens,
        graphs=graphs,
        kernels=sizes.kernels,
    )
    for wave in range(2):
        sampling = Sampling(max_tokens=sizes.tokens, ignore_eos=True)
        engine.submit(
            Request(request_id=f"{wave}-{row}", prompt_ids=tuple(prompt), seed=row, sampling=sampling)
            for row, prompt in enumerate(prompts)
        )
        engine.reset_times()
        num_tokens = 0
        while engine.num_requests:
            num_tokens += sum(len(each.token_ids) for each in engine.step().finished)
        engine.forget_prefixes()
    times = engine.times
    engine.release_memory()
    return {
        "tokens_per_s": num_tokens / times.step_s,
        "step_s": times.step_s / times.num_steps,
        "tokens_per_step": num_tokens / times.num_steps / len(prompts),
        "kernels": str(engine.kernels),
    }


def _generated(
    stock: Any, prompts: Sequence[Sequence[int]], sizes: EngineSizes, device: torch.device
) -> float:
    """Tokens a second, of the second of two calls; prefill is in it."""
    for _ in range(2):
        begun = _now(device)
        made = generate_stock(
            stock,
            prompts,
            max_tokens=sizes.tokens,
            temperature=1.0,
            eos_token_ids=(),
            seed=0,
            lookup_tokens=0,
        )
        seconds = _now(device) - begun
    return sum(map(len, made)) / seconds


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
