"""The training loop from outside: a run folder is made or gone on with, and left with a report.

What happens inside one step is `Run` in run.py.
"""

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from blockroll.config import RunConfig, by_path, load_config, to_mapping
from blockroll.errors import CheckpointError, ConfigError, GuardStopped, RunExists
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.algorithms import ALGORITHMS
from blockroll.rl_loops.checkpoint import Checkpoint, checkpoints, discard, load_checkpoint, step_of
from blockroll.rl_loops.display import StepProgress, summary_table
from blockroll.rl_loops.learner import Learner
from blockroll.rl_loops.report import write_report
from blockroll.rl_loops.run import Run, StepRecord, audit_folder, rollout_sampling
from blockroll.rl_loops.run_lock import run_lock
from blockroll.rl_loops.signals import exit_code, interrupts_held, stop_signals
from blockroll.rl_loops.tasks import Task, load_task
from blockroll.rl_loops.tracking import JsonLines, Wandb, read_lines, require_wandb, truncate_lines
from blockroll.rl_loops.watch.prometheus import Prometheus
from blockroll.rl_loops.watch.watch import looked_at
from blockroll.rollout.audit.files import drop_audit
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.planning.reading import read_plan
from blockroll.rollout.pool.makers import make_pool
from blockroll.rollout.pool.pool import RolloutPool
from blockroll.types import Plan, SamplingOptions
from blockroll.types.bounds import hints_of

Callback = Callable[[Mapping[str, Any]], None]

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "rollouts.jsonl"
# What decides which rollouts a step draws and what they are worth: another value is another run.
FIXED_ON_RESUME = (
    ("seed",),
    ("task",),
    ("policy", "path"),
    ("rollout", "mix_weight"),
    *(("rollout", name) for name in hints_of(SamplingOptions)),
    ("train", "algorithm"),
    ("train", "overlong_prompts"),
    ("train", "prompts_per_step"),
    ("train", "group_size"),
)
MAY_MOVE = ("name", "runs_dir")  # a run's folder may lie elsewhere


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a finished run leaves behind."""

    run_dir: Path
    report: Path
    metrics: tuple[Mapping[str, Any], ...]  # one object per step, as in metrics.jsonl
    policy_version: int  # the last one published


def train(
    config: RunConfig,
    *,
    task: Task | None = None,
    resume: bool = False,
    resume_from: str | None = None,
    lift_guard: bool = False,
    callbacks: Iterable[Callback] = (),
    pool: RolloutPool | None = None,
    console: Console | None = None,
) -> RunResult:
    """Run to `config.train.steps` and leave a report; `resume` goes on from the newest checkpoint.

    A run that goes on may have other options, but for `FIXED_ON_RESUME`: the console says which, and where no
    step is left for them CheckpointError does.
    `resume_from` goes on from the checkpoint of that name, such as `step_000010`, and discards what the run
    did after it: newer checkpoints, metrics, samples and audit rows; the console says so first.
    `lift_guard` ends a fallback of the guard that the run goes on with.
    Callbacks get the metrics of every step. A `pool` that is given must hold the policy that the run
    starts from; it is closed at the end like one made here. Sets the seeds of torch and random.
    Ctrl-C, SIGTERM, SIGHUP and every exception close the pool, keep a checkpoint of the last whole step and
    say how to resume; a signal exits with status 128 and its number. While weights change a signal waits for
    the end of the step, unless another one follows. RunInUse if another process works in the folder.
    GuardStopped, with a report, where the guard stops the run.
    """
    console = console or Console()
    run_dir = config.run_dir
    with stop_signals():
        try:
            source = _Source(run_dir=run_dir, resume=resume or resume_from is not None, name=resume_from)
            policy_version = _run_to_the_end(
                config, task, source, tuple(callbacks), pool, console, lift_guard=lift_guard
            )
        except GuardStopped:
            console.print(f"Report: {write_report(run_dir)}", soft_wrap=True, highlight=False)
            raise
        except KeyboardInterrupt as stop:
            console.print(f"Interrupted. {_what_now(run_dir)}", soft_wrap=True, highlight=False)
            raise SystemExit(exit_code(stop)) from None
    rows = read_lines(run_dir / METRICS_FILE)
    report = write_report(run_dir)
    if rows:
        console.print(summary_table(rows, name=config.name, report=report))
    return RunResult(run_dir=run_dir, report=report, metrics=tuple(rows), policy_version=policy_version)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where a run starts from."""

    run_dir: Path
    resume: bool
    name: str | None  # of a checkpoint; None: the newest

    def load(self) -> Checkpoint | None:
        """The checkpoint to go on from; None for a new run, whose folder must not be there."""
        if self.resume:
            return load_checkpoint(self.run_dir, self.name)
        if self.run_dir.exists():
            raise RunExists(
                f"{self.run_dir} exists: go on with it by --resume {self.run_dir}, or choose another name"
            )
        return None


def _run_to_the_end(
    config: RunConfig,
    task: Task | None,
    source: _Source,
    callbacks: tuple[Callback, ...],
    pool: RolloutPool | None,
    console: Console,
    *,
    lift_guard: bool,
) -> int:
    """Every step, with everything closed at the end; returns the last policy version."""
    run_dir = config.run_dir
    with contextlib.ExitStack() as stack:
        if pool is not None:
            stack.callback(pool.close)
            if config.rollout.audit != "off":
                raise ConfigError(
                    f"rollout.audit is {config.rollout.audit!r}, but the pool was given and records what it "
                    "was made to: make it with audit and audit_dir, and leave rollout.audit off"
                )
        if source.resume and run_dir.is_dir():
            stack.enter_context(run_lock(run_dir))
        checkpoint = source.load()
        changed = [] if checkpoint is None else _check_resumed(config, checkpoint)
        rollout_sampling(config)  # refuses what it must before anything is loaded
        task = task or load_task(config.task)
        if config.wandb:
            require_wandb()
        prometheus = _listen(config, stack, console) if config.metrics_port else None
        path = config.policy.path if checkpoint is None else str(checkpoint.folder)
        policy = HFPolicy.from_pretrained(
            path, device=config.policy.device, dtype=torch.float32, adapter=config.policy.adapter
        )
        plan = read_plan(config.rollout.plan, policy)
        if isinstance(plan, Plan):
            Engine.check_plan(plan, policy)  # here, not in each of the replicas
        learner = Learner(
            policy, config.train, ALGORITHMS[config.train.algorithm], kernels=config.rollout.kernels
        )
        if checkpoint is not None:
            learner.load_state_dict(checkpoint.state["learner"])
        audit_dir = audit_folder(config)
        if pool is None:
            rollout = dataclasses.replace(config.rollout, audit_dir=str(audit_dir))
            rollout = looked_at(rollout, config.watch)
            with console.status("starting replicas ..."):
                pool = make_pool(dataclasses.replace(config.policy, path=path), rollout)
            stack.enter_context(stop_signals())  # again: Ray has put a handler of its own in the place
            stack.callback(pool.close)
        if checkpoint is not None:
            pool.load_history(checkpoint.folder)
        random.seed(config.seed)
        torch.manual_seed(config.seed)
        run = Run(config, task, pool, learner)

        # Only now, so that a run that could not start leaves no folder behind, and loses nothing.
        if checkpoint is None:
            _make_folder(run_dir)
            stack.enter_context(run_lock(run_dir))
        else:
            _discard_after(checkpoint, config, audit_dir, changed, console)
        (run_dir / "config.yaml").write_text(yaml.safe_dump(to_mapping(config), sort_keys=False))
        records = Records(config, stack, prometheus)
        try:
            with stop_signals():
                what = "first evaluation" if checkpoint is None else "publishing weights"
                with console.status(f"{what} ..."):
                    run.start(None if checkpoint is None else checkpoint.state)
                    if lift_guard:
                        console.print(f"Guard: {run.lift_guard()}", soft_wrap=True, highlight=False)
                _steps(run, records, callbacks, console)
        except BaseException as error:
            _save_after(error, run, console)
            raise
        run.save()
        return run.step


def _steps(run: Run, records: "Records", callbacks: tuple[Callback, ...], console: Console) -> None:
    config = run.config
    with StepProgress(console, name=config.name, done=run.step, total=config.train.steps) as progress:
        while run.step < config.train.steps or run.has_unfinished_step:
            drawn = None if run.has_unfinished_step else run.draw()
            with interrupts_held():
                if drawn is not None:
                    run.learn(drawn)
                record = run.finish()
                records.log(record)
                run.settle()
            progress.show(record.metrics)
            for callback in callbacks:
                callback(record.metrics)
            run.check_guard()


class Records:
    """Where records of steps go: metrics.jsonl, rollouts.jsonl, Weights & Biases and Prometheus if asked."""

    def __init__(
        self, config: RunConfig, stack: contextlib.ExitStack, prometheus: Prometheus | None = None
    ) -> None:
        """Open everything; `stack` closes it, but for what is given."""
        run_dir = config.run_dir
        self._trackers: list[JsonLines | Wandb | Prometheus] = [JsonLines(run_dir / METRICS_FILE)]
        if config.wandb:
            self._trackers.append(Wandb(name=config.name, run_dir=run_dir, config=to_mapping(config)))
        self._samples = JsonLines(run_dir / SAMPLES_FILE)
        for tracker in (*self._trackers, self._samples):
            stack.callback(tracker.close)
        self._trackers += [prometheus] if prometheus is not None else []

    def log(self, record: StepRecord) -> None:
        """Write one step."""
        for sample in record.samples:
            self._samples.log(sample)
        for tracker in self._trackers:
            tracker.log(record.metrics)


def _listen(config: RunConfig, stack: contextlib.ExitStack, console: Console) -> Prometheus:
    prometheus = Prometheus(run=config.name, host=config.metrics_host, port=config.metrics_port)
    stack.callback(prometheus.close)
    console.print(f"Metrics for Prometheus at {prometheus.address}", soft_wrap=True, highlight=False)
    return prometheus


def _make_folder(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True)
    except FileExistsError:
        raise RunExists(f"{run_dir} was made by another process just now: choose another name") from None


def _discard_after(
    checkpoint: Checkpoint, config: RunConfig, audit_dir: Path, changed: Sequence[str], console: Console
) -> None:
    """What the run did after a checkpoint goes, newest first, so that it may be cut off at any point."""
    run_dir = config.run_dir
    newer = [path for path in checkpoints(run_dir) if step_of(path) > checkpoint.step]
    is_finished = checkpoint.state["unfinished"] is None
    last = checkpoint.step if is_finished else checkpoint.step - 1
    rows = read_lines(run_dir / METRICS_FILE)
    lost = [str(row["step"]) for row in rows if row["step"] > last]
    gone = [path.name for path in newer]
    gone += [f"metrics, samples and audit of steps {lost[0]} to {lost[-1]}"] if lost else []
    what = f"; discarding {', '.join(gone)}" if gone else ""
    if checkpoint.step < config.train.steps:
        options = f" with {', '.join(changed)}" if changed else ""
        going_on = f"Going on from step {checkpoint.step}{options}"
    else:
        going_on = f"All {checkpoint.step} steps are done; a larger train.steps goes on"
    console.print(f"{going_on}{what}.", soft_wrap=True, highlight=False, markup=False)
    for path in reversed(newer):
        discard(path)
    for name in (METRICS_FILE, SAMPLES_FILE):
        truncate_lines(run_dir / name, last)
    if audit_dir.is_dir():
        drop_audit(audit_dir, checkpoint.step, known=checkpoint.state["audit"])


def _save_after(error: BaseException, run: Run, console: Console) -> None:
    """Keep the last whole step of a run that `error` ends, and say how to go on, unless a signal did."""
    try:
        run.save()
    except CheckpointError as failure:
        console.print(f"No checkpoint of step {run.step}: {failure}", soft_wrap=True, highlight=False)
    if run.is_torn:
        console.print(f"Step {run.step + 1} was cut off in its update.", soft_wrap=True, highlight=False)
    if isinstance(error, Exception):
        what = f"Stopped by {type(error).__name__}. {_what_now(run.config.run_dir)}"
        console.print(what, soft_wrap=True, highlight=False)
    elif error.__cause__ is not None:
        what = f"The step failed after the signal: {type(error.__cause__).__name__}: {error.__cause__}"
        console.print(what, soft_wrap=True, highlight=False)


def _what_now(run_dir: Path) -> str:
    """How to go on after an interrupt."""
    found = checkpoints(run_dir)
    if found:
        return f"To go on from step {step_of(found[-1])}: blockroll train --resume {run_dir}"
    if run_dir.exists():
        return f"There is no checkpoint to resume from: delete {run_dir} to use its name again."
    return "The run had not started, and left nothing."


def load_run_config(run_dir: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The config of an existing run, wherever its folder lies now: what `train --resume` goes on with."""
    folder = Path(run_dir)
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"{folder} holds no config.yaml: it is not the folder of a run")
    config = load_config(folder / "config.yaml", overrides)
    return dataclasses.replace(config, name=folder.resolve().name, runs_dir=str(folder.resolve().parent))


def _check_resumed(config: RunConfig, checkpoint: Checkpoint) -> list[str]:
    """The options that are others than the checkpoint's, and how, in words.

    CheckpointError if one makes it another run, or if no step is left for one to change.
    """
    given, saved = (by_path(RunConfig, each) for each in (to_mapping(config), checkpoint.state["config"]))
    changed = [name for name in given if name not in MAY_MOVE and given[name] != saved.get(name, given[name])]
    for name in changed:
        if tuple(name.split(".")) in FIXED_ON_RESUME:
            raise CheckpointError(
                f"{name} is {given[name]!r}, but {config.run_dir} was started with {saved[name]!r}; "
                "resume with that, or start another run"
            )
    in_words = [f"{name} = {given[name]!r} (it was {saved[name]!r})" for name in changed]
    if changed and checkpoint.step >= config.train.steps:
        raise CheckpointError(
            f"{config.run_dir} has done step {checkpoint.step}, and train.steps is {config.train.steps}: no "
            f"step is left for {', '.join(in_words)}; give a larger train.steps, or start another run"
        )
    return in_words
