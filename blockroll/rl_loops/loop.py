"""The training loop from outside: a run folder is made or gone on with, and left with a report.

What happens inside one step is `Run` in run.py.
"""

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from blockroll.config import RunConfig, load_config, to_mapping
from blockroll.errors import BlockrollError, CheckpointError, ConfigError, RunExists
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.checkpoint import checkpoints, latest_checkpoint, load_trainer_state
from blockroll.rl_loops.display import StepProgress, summary_table
from blockroll.rl_loops.grpo import ALGORITHMS
from blockroll.rl_loops.learner import Learner
from blockroll.rl_loops.report import write_report
from blockroll.rl_loops.run import Run, rollout_sampling
from blockroll.rl_loops.signals import interrupts_held
from blockroll.rl_loops.tasks import Task, load_task
from blockroll.rl_loops.tracking import JsonLines, Wandb, read_lines, require_wandb, truncate_lines
from blockroll.rollout.audit.writer import drop_audit
from blockroll.rollout.pool.pool import RolloutPool, make_pool
from blockroll.types import SamplingOptions
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
    ("train", "prompts_per_step"),
    ("train", "group_size"),
)


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
    callbacks: Iterable[Callback] = (),
    pool: RolloutPool | None = None,
    console: Console | None = None,
) -> RunResult:
    """Run to `config.train.steps` and leave a report; `resume` goes on from the newest checkpoint.

    Callbacks get the metrics of every step. A `pool` that is given must hold the policy that the run
    starts from; it is closed at the end like one made here. Sets the seeds of torch and random.
    Ctrl-C closes the pool, keeps a checkpoint, says how to resume and exits with status 130; while weights
    change it waits for the end of the step, unless it is pressed twice.
    """
    console = console or Console()
    run_dir = config.run_dir
    try:
        policy_version = _run_to_the_end(config, task, resume, tuple(callbacks), pool, console)
    except KeyboardInterrupt:
        console.print(f"Interrupted. {_what_now(run_dir)}", soft_wrap=True, highlight=False)
        raise SystemExit(130) from None
    rows = read_lines(run_dir / METRICS_FILE)
    report = write_report(run_dir)
    if rows:
        console.print(summary_table(rows, name=config.name, report=report))
    return RunResult(run_dir=run_dir, report=report, metrics=tuple(rows), policy_version=policy_version)


def _run_to_the_end(
    config: RunConfig,
    task: Task | None,
    resume: bool,
    callbacks: tuple[Callback, ...],
    pool: RolloutPool | None,
    console: Console,
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
        state = _state_to_start_from(config, resume=resume)
        rollout_sampling(config)  # refuses what it must before anything is loaded
        task = task or load_task(config.task)
        if config.wandb:
            require_wandb()
        source = config.policy.path if state is None else str(latest_checkpoint(run_dir))
        policy = HFPolicy.from_pretrained(
            source, device=config.policy.device, dtype=torch.float32, adapter=config.policy.adapter
        )
        learner = Learner(policy, config.train, ALGORITHMS[config.train.algorithm])
        if pool is None:
            audit_dir = config.rollout.audit_dir or str(run_dir.resolve() / "audit")
            rollout = dataclasses.replace(config.rollout, audit_dir=audit_dir)
            if state is not None:
                drop_audit(Path(audit_dir), int(state["step"]))
            pool = make_pool(dataclasses.replace(config.policy, path=source), rollout)
            stack.callback(pool.close)

        # Only now, so that a run that could not start leaves no folder behind.
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(yaml.safe_dump(to_mapping(config), sort_keys=False))
        for name in (METRICS_FILE, SAMPLES_FILE):
            truncate_lines(run_dir / name, 0 if state is None else int(state["step"]))
        trackers: list[JsonLines | Wandb] = [JsonLines(run_dir / METRICS_FILE)]
        if config.wandb:
            trackers.append(Wandb(name=config.name, run_dir=run_dir, config=to_mapping(config)))
        samples = JsonLines(run_dir / SAMPLES_FILE)
        for tracker in (*trackers, samples):
            stack.callback(tracker.close)

        random.seed(config.seed)
        torch.manual_seed(config.seed)
        run = Run(config, task, pool, learner)
        try:
            run.start(state)
            with StepProgress(console, name=config.name, done=run.step, total=config.train.steps) as progress:
                while run.step < config.train.steps:
                    drawn = run.draw()
                    with interrupts_held():
                        metrics, texts = run.learn(drawn)
                        for tracker in trackers:
                            tracker.log(metrics)
                        for text in texts:
                            samples.log(text)
                        run.settle()
                    progress.show(metrics)
                    for callback in callbacks:
                        callback(metrics)
        except (KeyboardInterrupt, BlockrollError):
            run.save_if_settled()
            raise
        run.save_if_settled()
        return run.step


def _what_now(run_dir: Path) -> str:
    """How to go on after an interrupt."""
    if checkpoints(run_dir):
        return f"To go on from here: blockroll train --resume {run_dir}"
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


def _state_to_start_from(config: RunConfig, *, resume: bool) -> dict[str, Any] | None:
    run_dir = config.run_dir
    if not resume:
        if run_dir.exists():
            raise RunExists(f"{run_dir} exists: go on with it by --resume {run_dir}, or choose another name")
        return None
    state = load_trainer_state(latest_checkpoint(run_dir))
    now = to_mapping(config)
    for path in FIXED_ON_RESUME:
        given, saved = now, state["config"]
        for key in path:
            given, saved = given[key], saved[key]
        if given != saved:
            raise CheckpointError(
                f"{'.'.join(path)} is {given!r}, but {run_dir} was started with {saved!r}; "
                "resume with that, or start another run"
            )
    return state
