"""Constrained outputs of a real model with a real tokenizer, in every plan: how many are valid as a whole."""

import copy
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.rows import Row
from benchmarks.workload import SMOLLM2, has_smollm2
from blockroll.config import DraftConfig
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.draft_trainer import DraftTrainer
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.requests import derive_seed
from blockroll.samplers.constraints import JsonSchema, Regex
from blockroll.types import PLAIN, Constraint, Plan, Request, Rollout, Sampling

PATTERN = r"(Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day, [1-9][0-9]? (January|May|August), (19|20)[0-9]{2}"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "animal": {"type": "string", "pattern": "^[a-z]{3,12}$"},
        "legs": {"type": "integer", "minimum": 0, "maximum": 100},
        "colors": {"type": "array", "items": {"enum": ["black", "brown", "white"]}, "maxItems": 3},
    },
    "required": ["animal", "legs", "colors"],
    "additionalProperties": False,
}
ASKS = {
    "regex": (Regex(PATTERN), ("The day I was born was ", "We met on ", "The letter is dated ")),
    "json schema": (JsonSchema(SCHEMA), ("Describe an animal as JSON: ", "A pet as JSON: ", "JSON:")),
}


def is_valid(kind: str, text: str) -> bool:
    """Whether a whole output satisfies the constraint, decided without the library that enforced it."""
    if kind == "regex":
        return re.fullmatch(PATTERN, text) is not None
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return False
    return (
        set(value) == {"animal", "legs", "colors"}
        and re.fullmatch("[a-z]{3,12}", value["animal"]) is not None
        and isinstance(value["legs"], int)
        and 0 <= value["legs"] <= 100
        and len(value["colors"]) <= 3
        and set(value["colors"]) <= {"black", "brown", "white"}
    )


def constrained(
    policy: HFPolicy, plans: Sequence[Plan], *, count: int, batch: int = 32, max_tokens: int = 96
) -> list[Row]:
    """A row per plan and constraint. An output that its length cut off counts as invalid."""
    rows = []
    for plan in plans:
        for kind, (constraint, asks) in ASKS.items():
            rollouts = decode(policy, plan, constraint, asks, count=count, batch=batch, max_tokens=max_tokens)
            texts = [policy.decode(list(rollout.token_ids[:-1])) for rollout in rollouts]
            valid = [
                rollout.finish_reason == "stop" and is_valid(kind, text)
                for rollout, text in zip(rollouts, texts, strict=True)
            ]
            rows.append(
                {
                    "constraint": kind,
                    "plan": plan.name,
                    "outputs": count,
                    "valid": sum(valid),
                    "distinct": len(set(texts)),
                    "tokens": sum(len(rollout.token_ids) for rollout in rollouts),
                    "acceptance_rate": acceptance(rollouts),
                    "tokens_per_step": tokens_per_step(rollouts),
                }
            )
    return rows


def decode(
    policy: HFPolicy,
    plan: Plan,
    constraint: Constraint,
    asks: Sequence[str],
    *,
    count: int,
    batch: int,
    max_tokens: int,
) -> list[Rollout]:
    """So many outputs at temperature 1, the prompts in turn."""
    assert policy.tokenizer is not None
    prompts = [tuple(policy.tokenizer(ask)["input_ids"]) for ask in asks]
    engine = Engine(policy, plan=plan, max_batch_size=batch, max_length=256)
    engine.submit(
        Request(
            request_id=str(index),
            prompt_ids=prompts[index % len(prompts)],
            seed=derive_seed("constrained", index),
            sampling=Sampling(max_tokens=max_tokens, constraint=constraint),
        )
        for index in range(count)
    )
    rollouts: list[Rollout] = []
    while engine.num_requests:
        rollouts += engine.step().finished
    return rollouts


def acceptance(rollouts: Sequence[Rollout]) -> float | None:
    """Accepted drafts per draft, over all rollouts; None if nothing was drafted."""
    num_drafted = sum(rollout.stats.num_drafted for rollout in rollouts)
    return sum(rollout.stats.num_accepted for rollout in rollouts) / num_drafted if num_drafted else None


def tokens_per_step(rollouts: Sequence[Rollout]) -> float:
    """Committed tokens of a request in a step of its plan: 1 under plain."""
    num_steps = sum(count for rollout in rollouts for _, count in rollout.stats.steps_by_plan)
    return sum(len(rollout.token_ids) for rollout in rollouts) / num_steps


def outputs(*, count: int = 500, real: int = 32) -> list[Row]:
    """Valid outputs with SmolLM2's tokenizer, for each plan and each kind of constraint.

    Many of a small model with random weights, to which every constraint is a surprise, and a few of SmolLM2,
    whose drafts are often accepted.
    """
    smollm2 = HFPolicy.from_pretrained(SMOLLM2 / "policy", adapter=SMOLLM2 / "adapter")
    plans = [PLAIN, Plan(4), Plan(4, (0,)), Plan(4, (0, 4))]
    subjects = (("random weights", random_speaker(smollm2), count), ("SmolLM2-135M-Instruct", smollm2, real))
    return [
        {"policy": name, **row}
        for name, policy, number in subjects
        for row in constrained(policy, plans, count=number)
    ]


def random_speaker(policy: HFPolicy) -> HFPolicy:
    """A two-layer model of the same vocabulary and tokenizer, with an adapter that has learned nothing."""
    torch.manual_seed(0)
    config = copy.deepcopy(policy.model.config)
    config.update({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2})
    config.update({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
    speaker = HFPolicy(type(policy.model)(config).eval(), policy.tokenizer)
    DraftTrainer(speaker, DraftConfig(block_sizes=(4,)))
    speaker.describe_drafts((4,), ("two_forward", "fused"))
    return speaker


def experiments() -> dict[str, Callable[[], list[Row]]]:
    """Every experiment by the name of its result file."""
    return {"outputs": outputs} if has_smollm2("constraints", "outputs") else {}
