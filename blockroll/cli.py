"""The command line: demo, generate, train, bench, report, doctor.

A thin edge: it reads options, calls the library and prints. Everything heavy is imported inside the
commands, so that help is quick. A BlockrollError becomes one line on stderr and exit code 2.
"""

import dataclasses
import itertools
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import blockroll
from blockroll.config import (
    ConvertConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
    from_mapping,
    load_config,
    with_overrides,
)
from blockroll.errors import BlockrollError, InvalidInput, RunExists
from blockroll.types import PLAIN, Plan, Request, RolloutStats, Sampling

if TYPE_CHECKING:
    from blockroll.policies.hf import HFPolicy
    from blockroll.rollout.bench import BenchRow, Judge
    from blockroll.rollout.engine import Engine

DEMO = RunConfig(
    name="demo",
    rollout=RolloutConfig(temperature=1.5),
    train=TrainConfig(steps=25, eval_every=5),
)
DEMO_BATCHES = (1, 16)  # of the speed measured at the end of the demo
BENCH_PROMPTS = 256
WIDEST_TABLE = 250  # characters
DRAFTED_STYLE = "bold green underline"
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
EXTRAS = {  # optional package: what it gives
    "ray": "replicas in processes of their own",
    "trl": "training with TRL",
    "wandb": "metrics in Weights & Biases",
    "triton": "GPU kernels; builds of torch for GPUs bring their own",
}


class _Commands(typer.core.TyperGroup):
    """Turns the library's own errors into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; `--debug` lets the traceback through."""
        try:
            return super().invoke(ctx)
        except BlockrollError as error:
            if ctx.params.get("debug"):
                raise
            line = Text(f"Error: {error}", style="red")
            Console(stderr=True, soft_wrap=True).print(line)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            Console(stderr=True, soft_wrap=True).print("Interrupted.")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PolicyOption = Annotated[
    str, typer.Option(help="A Hugging Face checkpoint folder, or 'tiny' for the policy that ships.")
]
DeviceOption = Annotated[
    str, typer.Option(help="torch device; 'auto' takes the accelerator if there is one.")
]
SeedOption = Annotated[int, typer.Option(help="Equal seeds give equal tokens under one plan.")]
TemperatureOption = Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")]
ThreadsOption = Annotated[int, typer.Option(min=0, help="torch threads; 0 leaves torch's own choice.")]
BackendOption = Annotated[
    Literal["ray", "local"], typer.Option(help="Replicas as Ray actors, or in this process.")
]
WandbOption = Annotated[bool, typer.Option("--wandb", help="Also log to Weights & Biases.")]


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Rollouts for reinforcement learning, drafted in blocks and verified exactly."""
    if show_version:
        typer.echo(blockroll.__version__)
        raise typer.Exit


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Policy updates.")] = DEMO.train.steps,
    seed: Annotated[int, typer.Option(help="Every random choice derives from it.")] = 0,
    backend: BackendOption = "ray",
    wandb: WandbOption = False,
) -> None:
    """GRPO on arithmetic with the tiny policy on two replicas; replaces runs/demo."""
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
    _remove_run(config.run_dir, console)
    run_training(config, console=console)
    _finish_with_speed(config, console)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    policy: PolicyOption = "tiny",
    temperature: TemperatureOption = 1.0,
    seed: SeedOption = 0,
    max_tokens: Annotated[int, typer.Option(help="Tokens at most.")] = 64,
    plan: Annotated[
        str | None,
        typer.Option(
            help="'auto', 'plain', 'two_forward(K)' or 'fused(K,[levels])'; left out: what it drafts by."
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Samples, one after the other.")] = 1,
    task: Annotated[
        Literal["auto", "arithmetic", "none"],
        typer.Option(
            help="'arithmetic' ends the prompt with the line break its problems end with; 'none' takes the "
            "prompt as given; 'auto' is arithmetic for the tiny policy."
        ),
    ] = "auto",
    mark: Annotated[
        bool, typer.Option("--mark", help="Mark drafted tokens as [text] where there is no color.")
    ] = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 1,
) -> None:
    """Stream samples token by token; drafted and accepted tokens are marked."""
    sampling = Sampling(temperature=temperature, max_tokens=max_tokens)
    if task == "arithmetic" or (task == "auto" and policy == "tiny"):
        prompt = prompt.rstrip("\n") + "\n"
    hf_policy = _load_policy(policy, device, threads)
    chosen = plan or ("two_forward" if hf_policy.trained_drafts else "plain")
    engine, requests = _engine_for(hf_policy, chosen, prompt, sampling, seed=seed, num_samples=num_samples)
    console = Console(highlight=False, soft_wrap=True)
    is_styled = console.is_terminal and not console.no_color
    if is_styled or mark:
        sign = Text("green", style=DRAFTED_STYLE) if is_styled else Text("[brackets]")
        console.print(
            Text.assemble("Drafted and accepted tokens are in ", sign, "; the target drew the rest.")
        )
    for index, request in enumerate(requests):
        if num_samples > 1:
            console.print(f"--- sample {index + 1}", style="dim")
        stats, num_tokens = _stream(engine, hf_policy, request, console, is_styled=is_styled, mark=mark)
        Console(stderr=not console.is_terminal, highlight=False, soft_wrap=True).print(
            _counts_line(stats, num_tokens, engine.plan), style="dim"
        )


@app.command()
def train(
    config: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.yaml] [section.field=value ...]",
            help="A YAML file and overrides of its options.",
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="A run folder, to go on from its newest checkpoint.")
    ] = None,
    wandb: WandbOption = False,
) -> None:
    """Train as a config says: collect, advantages, update, publish."""
    from blockroll.rl_loops.loop import load_run_config
    from blockroll.rl_loops.loop import train as run_training

    path, overrides = _split_config(config or [])
    if wandb:
        overrides.append("wandb=true")
    if resume is None:
        run_training(load_config(path, overrides))
        return
    if path is not None:
        raise InvalidInput(
            f"--resume goes on with the config in {resume}; leave out {path}, overrides are allowed"
        )
    run_training(load_run_config(resume, overrides), resume=True)


@app.command()
def convert(
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[section.field=value ...]",
            help="Any option of ConvertConfig, such as draft.rank=16 or draft.block_sizes=[4,8].",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; it must not exist.")] = None,
    resume: Annotated[Path | None, typer.Option(help="A conversion's folder, to go on with it.")] = None,
    policy: PolicyOption = "tiny",
    prompts: Annotated[
        str, typer.Option(help="A JSONL file with a `prompt` per line (text or messages), or a task.")
    ] = "arithmetic",
    conversion: Annotated[
        Literal["adapter", "full"],
        typer.Option(help="An adapter beside the weights, or the weights themselves."),
    ] = "adapter",
    max_tokens: Annotated[int, typer.Option(help="Of the policy's own answers, in all.")] = 1_000_000,
    max_minutes: Annotated[float, typer.Option(help="Wall time; 0: no limit.")] = 0,
    replicas: Annotated[int, typer.Option(help="Replicas that answer in parallel.")] = 1,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
) -> None:
    """Teach a policy to draft, on its own answers; its own weights stay as they are."""
    import torch

    from blockroll.rl_loops.convert import convert as run_conversion
    from blockroll.rl_loops.convert import load_convert_config

    if threads:
        torch.set_num_threads(threads)
    if resume is not None:
        run_conversion(load_convert_config(resume), resume=True)
        return
    if out is None:
        raise InvalidInput("give --out FOLDER for the adapter, or --resume FOLDER to go on")
    values = with_overrides(
        {
            "out": str(out),
            "prompts": prompts,
            "max_tokens": max_tokens,
            "max_minutes": max_minutes,
            "num_replicas": replicas,
            "seed": seed,
            "policy": {"path": policy, "device": device},
            "draft": {"conversion": conversion},
        },
        options or [],
    )
    run_conversion(from_mapping(ConvertConfig, values))


@app.command()
def bench(
    policy: PolicyOption = "tiny",
    plans: Annotated[
        str,
        typer.Option(
            help="Plans, separated by commas: 'auto', 'plain', 'two_forward(K)', 'fused(K,[0,...])'."
        ),
    ] = "plain,two_forward",
    mix_weight: Annotated[
        str,
        typer.Option(help="Laws, separated by commas: 1 is the target, below 1 its weight in the mixture."),
    ] = "1",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8,64",
    temperature: Annotated[
        str, typer.Option(help="Sampling temperatures, separated by commas; 0 is greedy.")
    ] = "1",
    prompts: Annotated[
        Literal["text", "random"], typer.Option(help="Arithmetic problems, or token ids drawn at random.")
    ] = "text",
    prompt_tokens: Annotated[
        str | None,
        typer.Option(help="Exact prompt lengths, separated by commas; left out: as long as each problem is."),
    ] = None,
    max_tokens: Annotated[str, typer.Option(help="Completion lengths at most, separated by commas.")] = "64",
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Every completion has --max-tokens tokens.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Measured rounds of each workload.")] = 5,
    rollouts: Annotated[int, typer.Option(help="Rollouts of one round at least.")] = 8,
    seed: SeedOption = 0,
    against: Annotated[
        str | None,
        typer.Option(
            help="Also measure transformers' own 'generate', 'continuous_batching', 'assisted' (by prompt "
            "lookup), separated by commas."
        ),
    ] = None,
    task: Annotated[
        Literal["none", "arithmetic"],
        typer.Option(help="'arithmetic' judges the answers: pass@1 and pass@k of each plan and law."),
    ] = "none",
    samples: Annotated[int, typer.Option(help="Judged samples of each prompt.")] = 8,
    pass_k: Annotated[int, typer.Option(help="The k of pass@k.")] = 4,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the rows: a JSON array, or lines if it ends in .jsonl."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw speed-up over plain and acceptance by draft position into this .png."),
    ] = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 1,
) -> None:
    """Measure plans, laws and transformers against each other in one run; lists span a grid."""
    from blockroll.rollout.bench import BenchOptions, run_bench
    from blockroll.rollout.planner import read_plan

    options = BenchOptions(
        batches=_whole_numbers("--batch", batch),
        temperatures=_numbers("--temperature", temperature),
        prompt_tokens=(None,) if prompt_tokens is None else _whole_numbers("--prompt-tokens", prompt_tokens),
        max_tokens=_whole_numbers("--max-tokens", max_tokens),
        mix_weights=_numbers("--mix-weight", mix_weight),
        prompt_source=prompts,
        ignore_eos=ignore_eos,
        repeats=repeats,
        rollouts=rollouts,
        seed=seed,
    )
    _check_outputs(json_file, picture)
    hf_policy = _load_policy(policy, device, threads)
    parsed = [read_plan(text, hf_policy) for text in _split_plans(plans)]
    if picture is not None and PLAIN not in parsed:
        raise InvalidInput(f"--picture draws speed-ups over plain: add 'plain' to --plans, got {plans!r}")
    console = Console()
    with console.status("measuring ...") as status:
        rows = run_bench(
            hf_policy,
            _arithmetic_prompts(hf_policy) if prompts == "text" else [],
            parsed,
            options,
            policy_path=policy,
            against=against.replace(" ", "").split(",") if against else (),
            judge=_arithmetic_judge(hf_policy, samples, pass_k) if task == "arithmetic" else None,
            on_row=lambda row: status.update(f"measured {row.plan} at batch {row.batch} ..."),
        )
    table = _bench_table(rows, title=f"{policy} on {rows[0].setting.device}, {rows[0].setting.dtype}")
    # A figure that is cut short is of no use: a narrow terminal breaks the lines instead.
    needed = console.measure(table, options=console.options.update(max_width=WIDEST_TABLE)).maximum
    Console(width=max(console.width, needed)).print(table)
    if json_file is not None:
        _write_rows(json_file, rows)
        console.print(f"{len(rows)} rows written to {json_file}", highlight=False, soft_wrap=True)
    if picture is not None:
        _draw_bench(picture, rows)
        console.print(f"Picture: {picture}", highlight=False, soft_wrap=True)


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="The folder of a run.")]) -> None:
    """Write report.html into a run's folder."""
    from blockroll.rl_loops.report import write_report

    if not run_dir.is_dir():
        raise InvalidInput(f"no run folder at {run_dir}")
    Console(soft_wrap=True, highlight=False).print(f"Report: {write_report(run_dir)}")


@app.command()
def doctor(
    model: Annotated[
        Path | None,
        typer.Option(help="A checkpoint folder to check: are its rollouts lossless? Loaded in float32."),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="The folder of its draft adapter.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Say what this machine has and whether the tiny policy generates; with --model, check a checkpoint."""
    import torch

    if adapter is not None and model is None:
        raise InvalidInput(f"--adapter {adapter} needs the checkpoint it drafts for: give --model too")
    table = Table(show_header=False, box=None)
    for name, value in (*_machine(), *_versions()):
        table.add_row(name, value)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for package, gives in EXTRAS.items():
        if find_spec(package) is None:
            advice = "" if package == "triton" else f"; pip install 'blockroll[{package}]'"
            console.print(f"without {package}: no {gives}{advice}", style="yellow", markup=False)
    threads = torch.get_num_threads()
    try:
        stats, num_tokens = _trial()
    except (BlockrollError, OSError, RuntimeError) as error:
        console.print(
            f"tiny policy: does not work: {type(error).__name__}: {error}", style="red", markup=False
        )
        raise typer.Exit(1) from error
    finally:
        torch.set_num_threads(threads)
    console.print(f"tiny policy: generates ({_counts(stats, num_tokens)})", style="green")
    if model is not None and not _checks_out(model, adapter, device, console):
        raise typer.Exit(1)


def _checks_out(model: Path, adapter: Path | None, device: str, console: Console) -> bool:
    """Print the contract check of a checkpoint; whether it passed."""
    from blockroll.policies.hf import HFPolicy, resolve_checkpoint
    from blockroll.rollout.policy_check import check_policy

    has_tokenizer = (resolve_checkpoint(model) / "tokenizer_config.json").is_file()
    policy = HFPolicy.from_pretrained(model, device=device, with_tokenizer=has_tokenizer, adapter=adapter)
    report = check_policy(policy)
    title = Text(f"{model}: {report.subject}")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("check")
    table.add_column("measured", no_wrap=True)
    table.add_column("", no_wrap=True)
    for result in report.results:
        check = Text.assemble(result.name, (f"\n{result.detail}", "dim"))
        verdict = Text("passed", style="green") if result.passed else Text("FAILED", style="bold red")
        table.add_row(check, result.comparison, verdict)
    console.print(table)
    for sentence in report.not_checked:
        console.print(f"not checked: {sentence}", style="yellow", markup=False)
    console.print(report.conclusion, style="green" if report.passed else "red", markup=False)
    return report.passed


def _load_policy(path: str, device: str, threads: int) -> "HFPolicy":
    import torch

    from blockroll.policies.hf import HFPolicy

    if threads:
        torch.set_num_threads(threads)
    return HFPolicy.from_pretrained(path, device=device)


def _engine_for(
    policy: "HFPolicy", plan: str, prompt: str, sampling: Sampling, *, seed: int, num_samples: int
) -> tuple["Engine", list[Request]]:
    """An engine that decodes one request at a time, and the requests, as a pool would make them."""
    from blockroll.rollout.engine import Engine
    from blockroll.rollout.planner import read_plan
    from blockroll.rollout.pool import RolloutPool
    from blockroll.rollout.replica import LocalReplica

    engine = Engine(policy, plan=read_plan(plan, policy), max_batch_size=1)
    pool = RolloutPool([LocalReplica(engine, policy.model)], tokenizer=policy.tokenizer)
    return engine, pool.requests([prompt], sampling, seed=seed, num_samples=num_samples)


def _stream(
    engine: "Engine", policy: "HFPolicy", request: Request, console: Console, *, is_styled: bool, mark: bool
) -> tuple[RolloutStats, int]:
    """Print one sample while it is decoded; its counts, and how many tokens it has."""
    token_ids: list[int] = []
    shown = ""

    def show(new_ids: Sequence[int], *, is_drafted: bool) -> None:
        nonlocal shown
        token_ids.extend(new_ids)
        # A character whose last bytes are still to come decodes to U+FFFD: it waits for them.
        text = policy.decode(token_ids).rstrip("\ufffd")
        fresh, shown = text[len(shown) :], text
        if fresh:
            console.print(_styled(fresh, is_drafted, is_styled=is_styled, mark=mark), end="")

    engine.submit([request])
    while True:
        result = engine.step()
        for commit in result.commits:
            pairs = zip(commit.token_ids, commit.is_draft, strict=True)
            for is_drafted, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
                show([token_id for token_id, _ in run], is_drafted=is_drafted)
        if result.finished:
            break
    console.print()
    (rollout,) = result.finished
    if rollout.error is not None:
        raise InvalidInput(f"generation failed: {rollout.error}")
    return rollout.stats, len(rollout.token_ids)


def _styled(text: str, is_drafted: bool, *, is_styled: bool, mark: bool) -> Text:
    if is_drafted and is_styled:
        return Text(text, style=DRAFTED_STYLE)
    if is_drafted and mark:
        # A line break outside the brackets keeps the lines of the text what they are.
        lines = [f"[{line}]" if line else "" for line in text.split("\n")]
        return Text("\n".join(lines))
    return Text(text)


def _counts(stats: RolloutStats, num_tokens: int) -> str:
    rate = num_tokens / stats.num_forwards
    line = f"{num_tokens} tokens, {stats.num_forwards} forwards, {rate:.2f} tokens per forward"
    if stats.num_drafted:
        drafts = f"{stats.num_accepted} of {stats.num_drafted} drafts"
        line += f", acceptance {stats.acceptance_rate:.2f} ({drafts})"
    return line


def _counts_line(stats: RolloutStats, num_tokens: int, plan: Plan) -> Text:
    return Text(f"{plan.name}: {_counts(stats, num_tokens)}")


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


def _split_plans(text: str) -> list[str]:
    """Plans at the commas that stand outside parentheses."""
    return re.split(r",(?![^(]*\))", text)


def _whole_numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InvalidInput(f"{option} takes whole numbers separated by commas, got {text!r}") from None


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InvalidInput(f"{option} takes numbers separated by commas, got {text!r}") from None


def _check_outputs(json_file: Path | None, picture: Path | None) -> None:
    """Refuse before measuring what could not be written after it."""
    for option, path in (("--json", json_file), ("--picture", picture)):
        if path is not None and not path.parent.is_dir():
            raise InvalidInput(f"{option} {path}: there is no folder {path.parent}")
    if picture is not None and picture.suffix != ".png":
        raise InvalidInput(f"--picture {picture}: give a file that ends in .png")


def _remove_run(run_dir: Path, console: Console) -> None:
    """The demo is run again and again: its last run makes room. Anything that is no run stays."""
    if not run_dir.exists():
        return
    if not (run_dir / "config.yaml").is_file():
        raise RunExists(f"{run_dir} is in the way and is not the folder of a run; move it elsewhere")
    console.print(f"Replacing the earlier {run_dir}", highlight=False, soft_wrap=True)
    shutil.rmtree(run_dir)


def _finish_with_speed(config: RunConfig, console: Console) -> None:
    """Measure plain against drafted rollouts on the policy just trained, and put that into the report."""
    from blockroll.rl_loops.checkpoint import latest_checkpoint
    from blockroll.rl_loops.report import write_report
    from blockroll.rollout.bench import BenchOptions, run_bench
    from blockroll.rollout.planner import read_plan

    path = latest_checkpoint(config.run_dir)
    policy = _load_policy(str(path), config.policy.device, config.rollout.threads_per_replica)
    plans = [Plan(0), read_plan(config.rollout.plan, policy)]
    options = BenchOptions(
        batches=DEMO_BATCHES,
        max_tokens=(config.rollout.max_tokens,),
        temperatures=(config.rollout.temperature,),
        seed=config.seed,
    )
    with console.status("measuring drafted against plain rollouts ..."):
        rows = run_bench(policy, _arithmetic_prompts(policy), plans, options, policy_path=str(path))
    _write_rows(config.run_dir / "speed.json", rows)
    console.print(_bench_table(rows, title="Speed of the trained policy, one replica"))
    console.print(f"Report: {write_report(config.run_dir)}", highlight=False, soft_wrap=True)


def _arithmetic_prompts(policy: "HFPolicy") -> list[tuple[int, ...]]:
    from blockroll.rl_loops.tasks import load_task

    if policy.tokenizer is None:
        raise InvalidInput("the checkpoint has no tokenizer, and the bench's prompts are text")
    rows = load_task("arithmetic").eval_rows(BENCH_PROMPTS)
    return [tuple(policy.tokenizer(row["prompt"])["input_ids"]) for row in rows]


def _arithmetic_judge(policy: "HFPolicy", samples: int, k: int) -> "Judge":
    """Judges the first of `_arithmetic_prompts` by the task's reward."""
    from blockroll.rl_loops.tasks import load_task
    from blockroll.rollout.bench import Judge

    task = load_task("arithmetic")
    rows = task.eval_rows(BENCH_PROMPTS)

    def is_correct(index: int, token_ids: tuple[int, ...]) -> bool:
        rewards = task.reward_fn(
            prompts=[rows[index]["prompt"]],
            completions=[policy.decode(list(token_ids))],
            completion_ids=[list(token_ids)],
            answer=[rows[index]["answer"]],
        )
        return rewards[0] == 1.0

    return Judge(is_correct=is_correct, num_samples=samples, k=k)


def _bench_table(rows: Sequence["BenchRow"], *, title: str) -> Table:
    from blockroll.rollout.bench_table import bench_table

    return bench_table(rows, title=title)


def _draw_bench(path: Path, rows: Sequence["BenchRow"]) -> None:
    from blockroll.rl_loops.figures import save_bench
    from blockroll.rollout.bench import to_record

    save_bench([to_record(row) for row in rows], path)


def _write_rows(path: Path, rows: Sequence["BenchRow"]) -> None:
    from blockroll.rollout.bench import to_record

    records = [to_record(row) for row in rows]
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    else:
        text = json.dumps(records, indent=2, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _machine() -> Iterator[tuple[str, str]]:
    import torch

    is_cuda = torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "device", torch.cuda.get_device_name() if is_cuda else "cpu (no accelerator that torch can use)"
    yield "cores", str(cores)
    yield "torch threads", str(torch.get_num_threads())
    yield "OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "not set")


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    yield "blockroll", blockroll.__version__
    for package in ("torch", "transformers", *EXTRAS):
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "missing"


def _trial() -> tuple[RolloutStats, int]:
    """One short greedy rollout of the shipped policy."""
    policy = _load_policy("tiny", "auto", threads=1)
    sampling = Sampling(temperature=0.0, max_tokens=16)
    engine, requests = _engine_for(policy, "two_forward", "12+35-7=?\n", sampling, seed=0, num_samples=1)
    with open(os.devnull, "w") as nowhere:
        return _stream(engine, policy, requests[0], Console(file=nowhere), is_styled=False, mark=False)


if __name__ == "__main__":
    app()
