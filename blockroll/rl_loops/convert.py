"""`blockroll convert`: the policy answers prompts, its answers teach it to draft, until that stops helping.

Every round's answers are new, so what the first pass over them measures is a held-out figure. A round is the
unit of resuming: what an interrupt costs is the round under way.

The policy that answers is the one the conversion began with. A full conversion stays close to its law:
answers of the weights in training would let them drift.
"""

import contextlib
import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from blockroll.config import ConvertConfig, RolloutConfig
from blockroll.errors import RunExists
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.convert_report import (
    BATCHES,
    COST_CONTEXT,
    how_to_go_on,
    how_to_use,
    plan_table,
    plans_of,
    report,
)
from blockroll.rl_loops.convert_state import (
    CONFIG_FILE,
    METRICS_FILE,
    STATE_FILE,
    KindMetrics,
    Progressed,
    by_kind,
    check_fingerprint,
    check_resumed,
    cut_metrics,
    fingerprint,
    load_convert_config,
    load_state,
    resolved,
    save_config,
    save_state,
    scores,
    stop_reason,
    writing,
)
from blockroll.rl_loops.draft_trainer import DraftMetrics, DraftTrainer
from blockroll.rl_loops.prompts import Prompts, load_prompts
from blockroll.rl_loops.signals import exit_code, interrupts_held, stop_signals
from blockroll.rl_loops.step_costs import step_costs
from blockroll.rl_loops.tracking import JsonLines, read_lines
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.requests import check_request, derive_seed
from blockroll.rollout.pool.makers import make_pool
from blockroll.rollout.pool.pool import RolloutPool
from blockroll.rollout.pool.replica import LocalReplica
from blockroll.types import Plan, Request, Rollout, Sampling

__all__ = ["METRICS_FILE", "STATE_FILE", "ConvertResult", "convert", "load_convert_config"]

log = logging.getLogger(__name__)

REPORT_EVERY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertResult:
    """What a conversion leaves behind."""

    out: Path
    stop_reason: str
    num_tokens: int  # of the policy's own answers
    metrics: tuple[Mapping[str, Any], ...]  # one object per fresh step, as in convert.jsonl


def convert(
    config: ConvertConfig,
    *,
    resume: bool = False,
    policy: HFPolicy | None = None,
    console: Console | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> ConvertResult:
    """Generate and step until no acceptance rises or the budget is spent; `resume` goes on in `out`.

    A `policy` that is given is converted in place of loading one; to resume, it is what it was at the start.
    Of a conversion that goes on, options that say how far it goes or on what it runs may change
    (`convert_state.MAY_CHANGE`); others raise ConfigError. CheckpointError for a state that is damaged, and
    for a policy or prompts that are not those it was begun with.
    Ctrl-C and SIGTERM keep what the finished rounds taught, say how to go on and exit with 130 or 143.
    """
    console = console or Console()
    config = resolved(config)
    try:
        with stop_signals(), contextlib.ExitStack() as stack:
            return _convert(config, resume, policy, console, clock, stack)
    except KeyboardInterrupt as stop:
        if (Path(config.out) / CONFIG_FILE).is_file():
            advice = f"To go on from here: blockroll convert --resume {config.out}"
        else:
            advice = "The conversion had not started, and left nothing."
        console.print(f"Interrupted. {advice}", soft_wrap=True, highlight=False)
        raise SystemExit(exit_code(stop)) from None


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
    policy_path = "POLICY" if policy is not None else config.policy.path
    state = None
    if resume:
        check_resumed(config)
        state = load_state(out)
    done = Progressed() if state is None else state["progress"]
    reason = stop_reason(config, done)
    if reason is None:
        if policy is None:
            policy = HFPolicy.from_pretrained(
                config.policy.path,
                device=config.policy.device,
                dtype=config.policy.dtype,
                adapter=config.policy.adapter,
                prepack=config.policy.prepack,
                compile=config.policy.compile,
            )
        reason, done = _rounds(config, policy, state, done, console, clock, stack)
    what = "draft adapter" if config.draft.conversion == "adapter" else "policy"
    for line in (
        f"Stopped: {reason}. The {what} is in {out}",
        f"To go on all the same: {how_to_go_on(config, reason)}",
        how_to_use(config, policy_path),
    ):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return ConvertResult(
        out=out, stop_reason=reason, num_tokens=done.num_tokens, metrics=tuple(read_lines(out / METRICS_FILE))
    )


def _rounds(
    config: ConvertConfig,
    policy: HFPolicy,
    state: Mapping[str, Any] | None,
    done: Progressed,
    console: Console,
    clock: Callable[[], float],
    stack: contextlib.ExitStack,
) -> tuple[str, Progressed]:
    """Rounds until there is a reason to stop."""
    out = Path(config.out)
    found = fingerprint(config, policy)
    original = None
    if config.draft.conversion == "full":
        original = HFPolicy(copy.deepcopy(policy.model), policy.tokenizer)
    trainer = DraftTrainer(policy, config.draft, teacher=original, seed=config.seed)
    if state is not None:
        check_fingerprint(state, config, found)
        trainer.load_state_dict(state["trainer"])
    prompts = load_prompts(config.prompts, policy, config.chat_template_kwargs)
    pool = _make_pool(config, original or policy)
    stack.callback(pool.close)
    for request in _requests(config, prompts, done.round):
        check_request(request, pool.limits)  # a prompt that does not fit is named before hours are spent

    costs = step_costs(policy, plans_of(config), BATCHES, context=COST_CONTEXT, repeats=2)
    if state is None:
        console.print(plan_table(config, trainer, costs))
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        save_config(config)
        cut_metrics(out, done)
    tracker = JsonLines(out / METRICS_FILE)
    stack.callback(tracker.close)

    start = clock() - 60 * done.minutes
    reported = clock()
    reason = None
    with _progress(console) as progress:
        task = progress.add_task("convert", total=1.0, live="")
        progress.update(task, completed=_share_spent(config, done))
        while reason is None:
            rollouts = _answers(pool, _requests(config, prompts, done.round))
            trainer.lr_scale = _lr_scale(_share_spent(config, done))
            with interrupts_held(), writing(out):
                fresh = _round(trainer, rollouts, config)
                kinds = by_kind(fresh)
                done = Progressed(
                    round=done.round + 1,
                    num_tokens=done.num_tokens + sum(len(rollout.token_ids) for rollout in rollouts),
                    minutes=(clock() - start) / 60,
                    scores=(*done.scores, scores(kinds)),
                )
                for metrics in fresh:
                    tracker.log({"round": done.round, "num_tokens": done.num_tokens, **_record(metrics)})
                save_state(out, trainer.state_dict(), done, found)
                _save(out, trainer, prompts, kinds)
            live = " · ".join(f"{kind.name} {kind.tokens_per_step:.2f}" for kind in kinds)
            live = f"{live} tokens per step · {done.num_tokens:,} tokens"
            progress.update(task, completed=_share_spent(config, done), live=live)
            reason = stop_reason(config, done)
            if clock() - reported >= REPORT_EVERY_S or reason is not None:
                reported = clock()
                progress.console.print(report(kinds, costs), highlight=False, markup=False, soft_wrap=True)
    return reason, done


def _make_pool(config: ConvertConfig, policy: HFPolicy) -> RolloutPool:
    """A replica around this policy, or Ray actors that load it; they answer with its causal law alone."""
    if config.num_replicas == 1:
        engine = Engine(policy, plan=Plan(0), max_batch_size=config.max_batch_size)
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


def _share_spent(config: ConvertConfig, done: Progressed) -> float:
    share = done.num_tokens / config.max_tokens
    if config.max_minutes:
        share = max(share, done.minutes / config.max_minutes)
    return min(1.0, share)


def _lr_scale(share_spent: float) -> float:
    """Cosine from 1 to 0.1 over the budget."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * share_spent))


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


def _save(out: Path, trainer: DraftTrainer, prompts: Prompts, kinds: Sequence[KindMetrics]) -> None:
    """What users load; OSError if there is no room."""
    trainer.describe(tokens_per_step={kind.name: round(kind.tokens_per_step, 3) for kind in kinds})
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


def _record(metrics: DraftMetrics) -> dict[str, Any]:
    """A line of convert.jsonl. Tokens per step are of a whole block, two forwards each under two_forward."""
    record = asdict(metrics)
    forwards = 2 if metrics.layout == "two_forward" else 1
    return {
        **record,
        "acceptance_K": list(metrics.acceptance_K),
        "acceptance": metrics.acceptance,
        "tokens_per_forward": metrics.tokens_per_step / forwards,
    }
