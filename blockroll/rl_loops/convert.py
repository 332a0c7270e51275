"""`blockroll convert`: the policy answers prompts, its answers teach it to draft, until that stops helping.

Every round's answers are new, so what the first pass over them measures is a held-out figure. A round is the
unit of resuming: what an interrupt costs is the round under way.

The policy that answers is the one the conversion began with. A full conversion stays close to its law:
answers of the weights in training would let them drift.
"""

import contextlib
import copy
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from blockroll.config import ConvertConfig, RolloutConfig, from_mapping
from blockroll.errors import CheckpointError, RunExists
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.draft_trainer import DraftMetrics, DraftTrainer
from blockroll.rl_loops.prompts import Prompts, load_prompts
from blockroll.rl_loops.signals import interrupts_held
from blockroll.rl_loops.step_costs import step_costs
from blockroll.rl_loops.tracking import JsonLines, read_lines, truncate_lines
from blockroll.rollout.engine.engine import Engine
from blockroll.rollout.engine.requests import check_request, derive_seed
from blockroll.rollout.pool.pool import RolloutPool, make_pool
from blockroll.rollout.pool.replica import LocalReplica
from blockroll.types import Plan, Request, Rollout, Sampling

log = logging.getLogger(__name__)

STATE_FILE = "convert_state.pt"
METRICS_FILE = "convert.jsonl"
BATCHES = (1, 4, 16, 64)  # whose speed-up is predicted
COST_CONTEXT = 32  # tokens behind which steps are timed: short, because every batch is prefilled
SMOOTHING = 3  # rounds averaged before they are compared
REPORT_EVERY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertResult:
    """What a conversion leaves behind."""

    out: Path
    stop_reason: str
    num_tokens: int  # of the policy's own answers
    metrics: tuple[Mapping[str, Any], ...]  # one object per fresh step, as in convert.jsonl


@dataclass(slots=True)
class Progressed:
    """Where a conversion stands; saved after every round."""

    round: int = 0
    num_tokens: int = 0
    minutes: float = 0.0
    scores: tuple[float, ...] = ()  # tokens per step, one per round, over all kinds


def convert(
    config: ConvertConfig,
    *,
    resume: bool = False,
    policy: HFPolicy | None = None,
    console: Console | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> ConvertResult:
    """Generate and step until acceptance stops rising or the budget is spent; `resume` goes on in `out`.

    A `policy` that is given is converted in place of loading one; to resume, it is what it was at the start.
    Ctrl-C keeps what the finished rounds taught, says how to go on and exits with status 130.
    """
    console = console or Console()
    out = Path(config.out)
    try:
        with contextlib.ExitStack() as stack:
            return _convert(config, resume, policy, console, clock, stack)
    except KeyboardInterrupt:
        if (out / STATE_FILE).is_file():
            advice = f"To go on from here: blockroll convert --resume {out}"
        else:
            advice = "No round was finished, and nothing is kept."
        console.print(f"Interrupted. {advice}", soft_wrap=True, highlight=False)
        raise SystemExit(130) from None


def load_convert_config(out: str | Path) -> ConvertConfig:
    """The config of a conversion that was begun: what `convert --resume` goes on with."""
    path = Path(out) / "convert.json"
    if not path.is_file():
        raise CheckpointError(f"{out} holds no convert.json: no conversion was begun there")
    return replace(from_mapping(ConvertConfig, json.loads(path.read_text())), out=str(out))


def _convert(
    config: ConvertConfig,
    resume: bool,
    policy: HFPolicy | None,
    console: Console,
    clock: Callable[[], float],
    stack: contextlib.ExitStack,
) -> ConvertResult:
    out = Path(config.out)
    if out.exists() and not resume:
        raise RunExists(f"{out} exists: go on with it by --resume {out}, or choose another folder")
    if policy is None:
        policy = HFPolicy.from_pretrained(
            config.policy.path,
            device=config.policy.device,
            dtype=config.policy.dtype,
            adapter=config.policy.adapter,
        )
    original = None
    if config.draft.conversion == "full":
        original = HFPolicy(copy.deepcopy(policy.model), policy.tokenizer)
    trainer = DraftTrainer(policy, config.draft, teacher=original, seed=config.seed)
    state = _load_state(out) if resume else None
    done = Progressed()
    if state is not None:
        trainer.load_state_dict(state["trainer"])
        done = Progressed(**state["progress"])
    prompts = load_prompts(config.prompts, policy, config.chat_template_kwargs)
    pool = _make_pool(config, original or policy)
    stack.callback(pool.close)
    for request in _requests(config, prompts, done.round):
        check_request(request, pool.limits)  # a prompt that does not fit is named before hours are spent

    costs = step_costs(policy, _plans(config), BATCHES, context=COST_CONTEXT, repeats=2)
    if state is None:
        console.print(_plan_table(config, trainer, costs))
    out.mkdir(parents=True, exist_ok=True)
    (out / "convert.json").write_text(json.dumps(asdict(config), indent=2))
    truncate_lines(out / METRICS_FILE, done.round, key="round")
    tracker = JsonLines(out / METRICS_FILE)
    stack.callback(tracker.close)

    start = clock() - 60 * done.minutes
    reported = clock()
    reason = _stop_reason(config, done)
    with _progress(console) as progress:
        task = progress.add_task("convert", total=1.0, live="")
        progress.update(task, completed=_share_spent(config, done))
        while reason is None:
            rollouts = _answers(pool, _requests(config, prompts, done.round))
            trainer.lr_scale = _lr_scale(_share_spent(config, done))
            with interrupts_held():
                fresh = _round(trainer, rollouts, config)
                num_tokens = sum(len(rollout.token_ids) for rollout in rollouts)
                score = sum(metrics.tokens_per_step for metrics in fresh) / len(fresh)
                done = Progressed(
                    round=done.round + 1,
                    num_tokens=done.num_tokens + num_tokens,
                    minutes=(clock() - start) / 60,
                    scores=(*done.scores, score),
                )
                for metrics in fresh:
                    tracker.log({"round": done.round, "num_tokens": done.num_tokens, **_record(metrics)})
                _save(out, trainer, done, prompts, fresh)
            live = f"{score:.2f} tokens per step · {done.num_tokens:,} tokens"
            progress.update(task, completed=_share_spent(config, done), live=live)
            reason = _stop_reason(config, done)
            if clock() - reported >= REPORT_EVERY_S or reason is not None:
                reported = clock()
                progress.console.print(_report(fresh, costs), highlight=False)
    what = "draft adapter" if config.draft.conversion == "adapter" else "policy"
    console.print(f"Stopped: {reason}. The {what} is in {out}", soft_wrap=True, highlight=False)
    return ConvertResult(
        out=out, stop_reason=reason, num_tokens=done.num_tokens, metrics=tuple(read_lines(out / METRICS_FILE))
    )


def _make_pool(config: ConvertConfig, policy: HFPolicy) -> RolloutPool:
    """A replica around this policy, or Ray actors that load it; they answer with its causal law alone."""
    if config.num_replicas == 1:
        engine = Engine(policy, plan=Plan(0), max_batch_size=config.max_batch_size, decode=policy.decode)
        replica = LocalReplica(engine, policy.model)
        return RolloutPool(
            [replica], requests_per_replica=config.prompts_per_round, tokenizer=policy.tokenizer
        )
    return make_pool(
        replace(config.policy, adapter=None),
        RolloutConfig(num_replicas=config.num_replicas, plan="plain", max_batch_size=config.max_batch_size),
    )


def _requests(config: ConvertConfig, prompts: Prompts, round_index: int) -> list[Request]:
    """One request per prompt of a round: a function of seed and round alone."""
    first = round_index * config.prompts_per_round
    sampling = Sampling(temperature=config.temperature, max_tokens=config.completion_tokens)
    return [
        Request(
            request_id=f"convert-{index}",
            prompt_ids=prompts.token_ids(config.seed, index),
            seed=derive_seed(config.seed, "convert", index),
            sampling=sampling,
        )
        for index in range(first, first + config.prompts_per_round)
    ]


def _answers(pool: RolloutPool, requests: Sequence[Request]) -> list[Rollout]:
    """The rollouts, in the order of the requests whatever order they finished in."""
    finished = {rollout.request.request_id: rollout for rollout in pool.generate(requests)}
    return [finished[request.request_id] for request in requests]


def _round(trainer: DraftTrainer, rollouts: Sequence[Rollout], config: ConvertConfig) -> list[DraftMetrics]:
    """All steps of a round; returns what those of its first epoch saw on answers new to them."""
    usable = [rollout for rollout in rollouts if rollout.error is None and len(rollout.token_ids) > 1]
    if len(usable) < len(rollouts):
        log.warning("%d of %d answers are too short or failed", len(rollouts) - len(usable), len(rollouts))
    # Every kind of block gets a part of its own, so that a round measures them all.
    num_parts = min(max(config.steps_per_round, trainer.num_kinds), max(1, len(usable)))
    parts = [usable[index::num_parts] for index in range(num_parts)]
    fresh = [trainer.step(part) for part in parts]
    for epoch in range(1, config.epochs_per_round):
        for index in range(num_parts):
            trainer.step(parts[(index + epoch) % num_parts])
    return fresh


def _stop_reason(config: ConvertConfig, done: Progressed) -> str | None:
    """Why no further round follows, if none does."""
    if done.num_tokens >= config.max_tokens:
        return f"{done.num_tokens:,} tokens were used (max_tokens is {config.max_tokens:,})"
    if config.max_minutes and done.minutes >= config.max_minutes:
        return f"{done.minutes:.1f} minutes were used (max_minutes is {config.max_minutes:g})"
    smooth = [sum(done.scores[i - SMOOTHING : i]) / SMOOTHING for i in range(SMOOTHING, len(done.scores) + 1)]
    earlier, recent = smooth[: -config.patience], smooth[-config.patience :]
    if earlier and max(recent) < max(earlier) + config.min_gain:
        return f"acceptance stopped rising at {max(smooth):.2f} tokens per step"
    return None


def _share_spent(config: ConvertConfig, done: Progressed) -> float:
    share = done.num_tokens / config.max_tokens
    if config.max_minutes:
        share = max(share, done.minutes / config.max_minutes)
    return min(1.0, share)


def _lr_scale(share_spent: float) -> float:
    """Cosine from 1 to 0.1 over the budget."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * share_spent))


def _plans(config: ConvertConfig) -> list[Plan]:
    """Plain, and the plans that the trained kinds of blocks serve."""
    kinds = [(layout, k) for k in config.draft.block_sizes for layout in config.draft.layouts]
    return [Plan(0), *(_plan(layout, num_drafts) for layout, num_drafts in kinds)]


def _plan(layout: str, num_drafts: int) -> Plan:
    return Plan(num_drafts, (0, num_drafts) if layout == "fused" else ())


def _save(
    out: Path, trainer: DraftTrainer, done: Progressed, prompts: Prompts, fresh: Sequence[DraftMetrics]
) -> None:
    """The state to resume from, in one file, and then what users load."""
    partial = out / f"{STATE_FILE}.partial"
    torch.save({"trainer": trainer.state_dict(), "progress": asdict(done)}, partial)
    os.replace(partial, out / STATE_FILE)
    trainer.describe(
        tokens_per_step={f"{m.layout}({m.num_drafts})": round(m.tokens_per_step, 3) for m in fresh}
    )
    adapter = trainer.policy.adapter
    if adapter is not None and trainer.config.conversion == "adapter":
        adapter.config = replace(
            adapter.config,
            chat_template_hash=prompts.chat_template_hash,
            chat_template_kwargs=prompts.chat_template_kwargs,
        )
        adapter.save_pretrained(out)
    else:
        trainer.policy.save_pretrained(out)


def _load_state(out: Path) -> dict[str, Any]:
    path = out / STATE_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{out} holds no {STATE_FILE}: no round was finished; delete it and start again"
        )
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _record(metrics: DraftMetrics) -> dict[str, Any]:
    record = asdict(metrics)
    return {**record, "acceptance_K": list(metrics.acceptance_K), "acceptance": metrics.acceptance}


def _plan_table(
    config: ConvertConfig, trainer: DraftTrainer, costs: Mapping[tuple[Plan, int], float]
) -> Table:
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
        ("time", f"at most {answering_s / 60:.0f} minutes for the answers; training about as long again"),
        ("blocks", ", ".join(plan.name for plan in _plans(config)[1:])),
    ):
        table.add_row(name, value)
    return table


def _report(fresh: Sequence[DraftMetrics], costs: Mapping[tuple[Plan, int], float]) -> str:
    """Acceptance by position, tokens per forward, and the speed-up over plain that the costs predict.

    All on answers that were not yet trained on. For fused blocks these are upper bounds: where no level fits
    what was accepted, a step has fewer drafts.
    """
    latest = {(metrics.layout, metrics.num_drafts): metrics for metrics in fresh}
    lines = []
    for (layout, num_drafts), metrics in sorted(latest.items()):
        plan = _plan(layout, num_drafts)
        gains = [metrics.tokens_per_step * costs[Plan(0), b] / costs[plan, b] for b in BATCHES]
        per_forward = metrics.tokens_per_step / plan.forwards_per_step
        lines += [
            f"{layout}({num_drafts}): {per_forward:.2f} tokens per forward",
            "  acceptance by position  " + " ".join(f"{value:.2f}" for value in metrics.acceptance_K),
            f"  predicted speed-up      {' '.join(f'{gain:.2f}x' for gain in gains)}  "
            f"at batch {', '.join(map(str, BATCHES))}",
        ]
        if not math.isnan(metrics.policy_kl):
            lines.append(f"  the policy has moved    {metrics.policy_kl:.4f} nats per token (KL)")
    return "\n".join(lines)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    with Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[live]}"),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        yield progress
