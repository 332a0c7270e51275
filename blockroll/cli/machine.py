"""What works here: doctor."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import blockroll
from blockroll.cli.options import AdapterOption, DeviceOption, load_policy
from blockroll.cli.texts import counts, engine_for, stream
from blockroll.errors import BlockrollError, InvalidInput
from blockroll.types import RolloutStats, Sampling

EXTRAS = {  # optional package: what it gives
    "ray": "replicas in processes of their own",
    "trl": "training with TRL",
    "wandb": "metrics in Weights & Biases",
    "triton": "GPU kernels; builds of torch for GPUs bring their own",
}


def doctor(
    model: Annotated[
        Path | None,
        typer.Option(help="A checkpoint folder to check: are its rollouts lossless? Loaded in float32."),
    ] = None,
    adapter: AdapterOption = None,
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
    console.print(f"tiny policy: generates ({counts(stats, num_tokens)})", style="green")
    if model is not None and not _checks_out(model, adapter, device, console):
        raise typer.Exit(1)


def _checks_out(model: Path, adapter: Path | None, device: str, console: Console) -> bool:
    """Print the contract check of a checkpoint; whether it passed."""
    from blockroll.policies.hf import HFPolicy
    from blockroll.policies.loading import resolve_checkpoint
    from blockroll.policy_check.check import check_policy

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
    policy = load_policy("tiny", "auto", threads=1)
    sampling = Sampling(temperature=0.0, max_tokens=16)
    engine, requests = engine_for(policy, "two_forward", "12+35-7=?\n", sampling, seed=0, num_samples=1)
    with open(os.devnull, "w") as nowhere:
        return stream(engine, policy, requests[0], Console(file=nowhere), is_styled=False, mark=False)
