"""Training runs: demo, train, report."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console

import blockroll
from blockroll.cli.options import (
    AdapterOption,
    BackendOption,
    MetricsPortOption,
    WandbOption,
    check_output,
    load_policy,
)
from blockroll.cli.speed import arithmetic_prompts, print_table, write_rows
from blockroll.config import RolloutConfig, RunConfig, TrainConfig, load_config, to_mapping
from blockroll.errors import InvalidInput, RunExists
from blockroll.types import PLAIN

DEMO = RunConfig(
    name="demo",
    rollout=RolloutConfig(plan="two_forward", temperature=1.5, audit="all"),
    train=TrainConfig(steps=25, eval_every=5),
)
WHAT_TO_TRAIN = (
    "say what to train: a YAML file, options such as policy.path=DIR task=my_module:task, or --resume RUN "
    "(`blockroll train --help` has examples, `blockroll train --show-config` all options with their "
    "defaults, and `blockroll demo` trains the shipped policy)"
)
GRAFANA = Path(blockroll.__file__).parent / "rl_loops" / "watch" / "grafana.json"
DEMO_BATCHES = (1, 16)  # of the speed measured at the end of the demo


def demo(
    steps: Annotated[int, typer.Option(min=1, help="Policy updates.")] = DEMO.train.steps,
    seed: Annotated[int, typer.Option(help="Every random choice derives from it.")] = 0,
    backend: BackendOption = "ray",
    wandb: WandbOption = False,
) -> None:
    """GRPO on arithmetic with the tiny policy on two replicas. Replaces runs/demo."""
    from blockroll.rl_loops.loop import train as run_training

    console = Console()
    if backend == "ray" and find_spec("ray") is None:
        console.print(
            "Ray is not installed (pip install 'blockroll[ray]'): both replicas run in this process.",
            style="yellow",
            highlight=False,
        )
        backend = "local"
    config = dataclasses.replace(
        DEMO,
        seed=seed,
        wandb=wandb,
        rollout=dataclasses.replace(DEMO.rollout, backend=backend),
        train=dataclasses.replace(DEMO.train, steps=steps, eval_every=min(DEMO.train.eval_every, steps)),
    )
    check_output("the run folder", config.run_dir, is_folder=True)
    _remove_run(config.run_dir, console)
    run_training(config, console=console)
    _finish_with_speed(config, console)


def train(
    config: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.yaml] [section.field=value ...]",
            help="A YAML file and overrides of its options, which --show-config lists.",
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="A run folder, to go on from its newest checkpoint.")
    ] = None,
    adapter: AdapterOption = None,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print every option with its value as YAML, and stop.")
    ] = False,
    from_checkpoint: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="CHECKPOINT",
            help="With --resume: an older checkpoint, such as step_000010; what the run did after it goes.",
        ),
    ] = None,
    lift_guard: Annotated[
        bool, typer.Option("--lift-guard", help="With --resume: end a fallback of the guard.")
    ] = False,
    wandb: WandbOption = False,
    metrics_port: MetricsPortOption = None,
) -> None:
    """Train as a config says: collect, advantages, update, publish."""
    if from_checkpoint is not None and resume is None:
        raise InvalidInput("--from says which checkpoint of a run to go on from: name the run by --resume")
    if lift_guard and resume is None:
        raise InvalidInput("--lift-guard ends a fallback that a run is in: name the run by --resume")
    path, overrides = _split_config(config or [])
    if wandb:
        overrides.append("wandb=true")
    if metrics_port is not None:
        overrides.append(f"metrics_port={metrics_port}")
    if adapter is not None:
        overrides.append(f"policy.adapter={json.dumps(str(adapter.resolve()))}")
    if show_config and resume is None:
        typer.echo(yaml.safe_dump(to_mapping(load_config(path, overrides)), sort_keys=False), nl=False)
        return
    if resume is None and not config:
        raise InvalidInput(WHAT_TO_TRAIN)
    from blockroll.rl_loops.loop import load_run_config
    from blockroll.rl_loops.loop import train as run_training

    if resume is None:
        loaded = load_config(path, overrides)
        check_output("the run folder", loaded.run_dir, is_folder=True)
        if loaded.rollout.audit != "off" and loaded.rollout.audit_dir:
            check_output("rollout.audit_dir", Path(loaded.rollout.audit_dir), is_folder=True)
        run_training(loaded)
        return
    if path is not None:
        raise InvalidInput(
            f"--resume goes on with the config in {resume}; leave out {path}, overrides are allowed"
        )
    config_of_run = load_run_config(resume, overrides)
    run_training(config_of_run, resume=True, resume_from=from_checkpoint, lift_guard=lift_guard)


def report(
    run_dir: Annotated[Path | None, typer.Argument(help="The folder of a run.")] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Show the run here instead, until it has ended or Ctrl-C.")
    ] = False,
    once: Annotated[bool, typer.Option("--once", help="With --live: one frame of it.")] = False,
    grafana: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the Grafana dashboard of --metrics-port there, for any run."
        ),
    ] = None,
) -> None:
    """Write report.html into a run's folder, or show a run live."""
    console = Console(soft_wrap=True, highlight=False)
    if once and not live:
        raise InvalidInput("--once is for a frame of --live: give both")
    if grafana is not None:
        check_output("--grafana", grafana)
        shutil.copyfile(GRAFANA, grafana)
        console.print(f"Dashboard: {grafana}")
    if run_dir is None:
        if grafana is None:
            raise InvalidInput("give the folder of a run, as runs/demo")
        return
    if not (run_dir / "config.yaml").is_file():
        raise InvalidInput(f"no run folder at {run_dir}: give the folder of a run, as runs/demo")
    if live:
        from blockroll.rl_loops.watch.live import watch

        watch(run_dir, Console(highlight=False), is_once=once)
        return
    from blockroll.rl_loops.report import write_report

    console.print(f"Report: {write_report(run_dir)}")


def _split_config(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The YAML file, if one is named, and the overrides."""
    paths = [argument for argument in arguments if "=" not in argument]
    if len(paths) > 1:
        raise InvalidInput(
            f"one config file is read, got {', '.join(paths)}; an option is written section.field=value"
        )
    path = Path(paths[0]) if paths else None
    if path is not None and not path.is_file():
        raise InvalidInput(f"no config file at {path}")
    return path, [argument for argument in arguments if "=" in argument]


def _remove_run(run_dir: Path, console: Console) -> None:
    """The demo is run again and again: its last run makes room. Anything that is no run stays."""
    from blockroll.rl_loops.run_lock import run_lock

    if not run_dir.exists():
        return
    if not (run_dir / "config.yaml").is_file():
        raise RunExists(f"{run_dir} is in the way and is not the folder of a run; move it elsewhere")
    with run_lock(run_dir):
        console.print(f"Replacing the earlier {run_dir}", highlight=False, soft_wrap=True)
        shutil.rmtree(run_dir)


def _finish_with_speed(config: RunConfig, console: Console) -> None:
    """Measure plain against drafted rollouts on the policy just trained, and put that into the report."""
    from blockroll.bench.bench import BenchOptions, run_bench
    from blockroll.rl_loops.checkpoint import latest_checkpoint
    from blockroll.rl_loops.report import write_report
    from blockroll.rollout.planning.reading import read_plan

    path = latest_checkpoint(config.run_dir)
    policy = load_policy(str(path), config.policy.device, config.rollout.threads_per_replica)
    plans = [PLAIN, read_plan(config.rollout.plan, policy)]
    options = BenchOptions(
        batches=DEMO_BATCHES,
        max_tokens=(config.rollout.max_tokens,),
        temperatures=(config.rollout.temperature,),
        seed=config.seed,
    )
    with console.status("measuring drafted against plain rollouts ..."):
        rows = run_bench(policy, arithmetic_prompts(policy), plans, options, policy_path=str(path))
    write_rows(config.run_dir / "speed.json", rows)
    print_table(console, rows, title="Speed of the trained policy, one replica")
    console.print(f"Report: {write_report(config.run_dir)}", highlight=False, soft_wrap=True)
