"""What `blockroll convert` says: what it will do, how far drafting has come, and how to use the result.

Acceptance is measured, on answers not yet trained on; so is what a step costs, on this machine. A speed-up is
predicted, from both.
"""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from blockroll.config import ConvertConfig
from blockroll.rl_loops.convert_state import KindMetrics
from blockroll.rl_loops.draft_trainer import DraftTrainer
from blockroll.types import Plan, PlanKind

BATCHES = (1, 4, 16, 64)  # whose speed-up is predicted
COST_CONTEXT = 32  # tokens behind which steps are timed: short, because every batch is prefilled

Costs = Mapping[tuple[Plan, int], float]  # seconds of one step, by plan and batch


def plans_of(config: ConvertConfig) -> list[Plan]:
    """Plain, and the plans that the trained kinds of blocks serve."""
    kinds = [(layout, k) for k in config.draft.block_sizes for layout in config.draft.layouts]
    return [Plan(0), *(_plan(layout, num_drafts) for layout, num_drafts in kinds)]


def plan_table(config: ConvertConfig, trainer: DraftTrainer, costs: Costs) -> Table:
    """What will be trained, on how much, and about how long it takes."""
    model_bytes = sum(p.numel() * p.element_size() for p in trainer.policy.model.parameters())
    trained_bytes = 16 * trainer.num_parameters  # weights, gradient and two moments in float32
    rounds = math.ceil(config.max_tokens / (config.prompts_per_round * config.completion_tokens))
    nearest = min(BATCHES, key=lambda batch: abs(batch - config.max_batch_size))
    answering_s = config.max_tokens / config.num_replicas * costs[Plan(0), nearest] / nearest
    table = Table(show_header=False, box=None)
    for name, value in (
        ("trainable parameters", f"{trainer.num_parameters:,} ({config.draft.conversion})"),
        ("tokens", f"at most {config.max_tokens:,} of the policy's own, {rounds:,} rounds"),
        ("memory", f"{(model_bytes + trained_bytes) / 2**30:.2f} GiB for weights and optimizer"),
        ("time", f"at most {answering_s / 60:.1f} minutes for the answers; training about as long again"),
        ("blocks", ", ".join(plan.name for plan in plans_of(config)[1:])),
    ):
        table.add_row(name, value)
    return table


def report(kinds: Sequence[KindMetrics], costs: Costs) -> str:
    """Of each kind of block: tokens per step and per forward, acceptance by position, predicted speed-up."""
    lines = []
    for kind in kinds:
        plan = _plan(kind.layout, kind.num_drafts)
        tokens = expected_tokens(kind, plan)
        gains = [predicted_speedup(tokens, plan, batch, costs) for batch in BATCHES]
        lines += [
            f"{plan.name}: {tokens:.2f} tokens per step, {tokens / plan.forwards_per_step:.2f} per forward",
            "  acceptance by position  " + " ".join(f"{value:.2f}" for value in kind.acceptance_K),
            f"  predicted speed-up      {' '.join(f'{gain:.2f}x' for gain in gains)}  "
            f"at batch {', '.join(map(str, BATCHES))}",
        ]
        if not math.isnan(kind.policy_kl):
            lines.append(f"  the policy has moved    {kind.policy_kl:.4f} nats per token (KL)")
    lines.append(
        "Measured: acceptance, on answers not yet trained on, and the time of steps on this machine behind "
        f"{COST_CONTEXT} tokens. Predicted: speed-up over plain, their quotient, never above tokens per "
        "forward; prefill and the ends of texts are left out (blockroll bench measures them)."
    )
    return "\n".join(lines)


def predicted_speedup(tokens_per_step: float, plan: Plan, batch: int, costs: Costs) -> float:
    """Over plain decoding: tokens of a step over what it costs in plain steps.

    At most the tokens per forward: no forward of a plan is cheaper than a plain step, whatever a clock says.
    """
    gain = tokens_per_step * costs[Plan(0), batch] / costs[plan, batch]
    return min(gain, tokens_per_step / plan.forwards_per_step)


def expected_tokens(kind: KindMetrics, plan: Plan) -> float:
    """Tokens of a step under this plan, from the acceptance at each position.

    A fused plan keeps the proposal of the largest level at or below what was accepted, so the next step has
    only the drafts behind what is missing: a Markov chain over how many are missing, whose mean is taken. A
    position that was not met counts as refused.
    """
    if plan.kind is not PlanKind.FUSED:
        return kind.tokens_per_step
    num_drafts = plan.num_drafts
    accept_K = [0.0 if math.isnan(value) else value for value in kind.acceptance_K]
    chain = [[0.0] * (num_drafts + 1) for _ in range(num_drafts + 1)]
    tokens = [1.0] * (num_drafts + 1)
    for missing in range(num_drafts + 1):
        reached = 1.0
        for accepted in range(num_drafts - missing + 1):
            is_last = accepted == num_drafts - missing
            ends = reached * (1.0 if is_last else 1 - accept_K[missing + accepted])
            level = max(each for each in plan.levels if each <= accepted)
            chain[missing][min(accepted - level, num_drafts)] += ends
            tokens[missing] += ends * accepted
            reached -= ends
    share = [1.0] + [0.0] * num_drafts
    for _ in range(1000):
        share = [sum(share[a] * chain[a][b] for a in range(num_drafts + 1)) for b in range(num_drafts + 1)]
    mean = sum(each * count for each, count in zip(share, tokens, strict=True))
    return min(mean, kind.tokens_per_step)


def how_to_go_on(config: ConvertConfig, reason: str) -> str:
    """The command that takes a conversion that has stopped further."""
    if "max_tokens" in reason:
        more = f"--max-tokens {2 * config.max_tokens}"
    elif "max_minutes" in reason:
        more = f"--max-minutes {2 * config.max_minutes:g}"
    else:
        more = f"patience={2 * config.patience}"
    return f"blockroll convert --resume {shlex.quote(config.out)} {more}"


def how_to_use(config: ConvertConfig, policy_path: str) -> str:
    """One line: the option by which every command, call, config and trainer takes the result."""
    out = Path(config.out)
    if config.draft.conversion == "full":
        return (
            f"Use it as a policy: --policy {shlex.quote(str(out))} (generate, bench; doctor --model), "
            f"policy.path={out} (train), from_pretrained({json.dumps(str(out))}), or as TRL's model."
        )
    quoted, name = shlex.quote(str(out)), json.dumps(str(out))
    return (
        f"Use it: --policy {shlex.quote(policy_path)} --adapter {quoted} (generate, bench; doctor --model), "
        f"train --adapter {quoted}, or policy.adapter={out} in a config, "
        f"RolloutPool.from_pretrained({json.dumps(policy_path)}, adapter={name}), "
        f"GRPOTrainer(..., adapter={name}) in TRL."
    )


def _plan(layout: str, num_drafts: int) -> Plan:
    return Plan(num_drafts, (0, num_drafts) if layout == "fused" else ())
