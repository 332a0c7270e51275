"""What works here: doctor."""

import json
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import blockroll
from blockroll.cli.errors import FAILED
from blockroll.cli.memory import config_of, show_memory
from blockroll.cli.options import AdapterOption, DeviceOption, JsonOption, load_policy
from blockroll.cli.plans import show_plans
from blockroll.cli.prompts import PromptsOption, prompts_from
from blockroll.cli.texts import counts, engine_for, stream
from blockroll.errors import BlockrollError, InvalidInput
from blockroll.types import Rollout, Sampling

if TYPE_CHECKING:
    from blockroll.policies.hf import HFPolicy
    from blockroll.policy_check.check import PolicyReport

EXTRAS = {  # optional package: the extra that brings it, if one does, and what it gives
    "ray": ("ray", "replicas in processes of their own"),
    "trl": ("trl", "training with TRL"),
    "wandb": ("wandb", "metrics in Weights & Biases"),
    "prometheus_client": ("metrics", "metrics for Prometheus"),
    "triton": (None, "GPU kernels; builds of torch for GPUs bring their own"),
}


def doctor(
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[section.field=value ...]",
            help="Options of `policy` and `rollout`, as train takes them, that memory is told for.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A checkpoint to check (a folder or Hub id): does it fit, and are its rollouts lossless? "
            "Loaded in float32."
        ),
    ] = None,
    adapter: AdapterOption = None,
    prompts: PromptsOption = None,
    as_json: JsonOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Say what this machine has, or check a checkpoint by --model.

    The tiny policy generates once. With --model it says first, before anything is loaded, what the checkpoint
    takes of memory and how many requests that serves, and at last measures what its plans cost here. With
    --prompts the check runs on texts of yours: long ones reach sliding windows and scaled positions.
    """
    for given in (adapter and f"--adapter {adapter}", prompts and f"--prompts {prompts}", *(options or ())):
        if given is not None and model is None:
            raise InvalidInput(f"{given} is for the check of a checkpoint: give --model too")
    config = config_of(options or ())
    console = Console(highlight=False, soft_wrap=True, quiet=as_json)
    facts: dict[str, Any] = {"machine": dict(_machine()), "versions": dict(_versions())}
    table = Table(show_header=False, box=None)
    for name, value in (*facts["machine"].items(), *facts["versions"].items()):
        table.add_row(name, value)
    console.print(table)
    for package, (extra, gives) in EXTRAS.items():
        if find_spec(package) is None:
            advice = "" if extra is None else f"; pip install 'blockroll[{extra}]'"
            console.print(f"without {package}: no {gives}{advice}", style="yellow", markup=False)
    facts["tiny_policy"] = _trial_in_words(console)
    passed = facts["tiny_policy"]["works"]
    if passed and model is not None:
        facts["memory"] = show_memory(model, adapter, device, config, console)
        policy, report = _check(model, adapter, prompts, device)
        _print_report(model, report, console)
        facts["check"] = _report_fields(report)
        facts["planner"] = show_plans(policy, console)
        passed = report.passed
    if as_json:
        typer.echo(json.dumps({"passed": passed, **facts}))
    if not passed:
        raise typer.Exit(FAILED)


def _trial_in_words(console: Console) -> dict[str, Any]:
    """Whether the shipped policy generates here, printed and as fields."""
    import torch

    threads = torch.get_num_threads()
    try:
        rollout = _trial()
    except (BlockrollError, OSError, RuntimeError) as error:
        found = f"{type(error).__name__}: {error}"
        console.print(f"tiny policy: does not work: {found}", style="red", markup=False)
        return {"works": False, "error": found}
    finally:
        torch.set_num_threads(threads)
    console.print(f"tiny policy: generates ({counts(rollout)})", style="green")
    return {"works": True, "tokens": len(rollout.token_ids), "forwards": rollout.stats.num_forwards}


def _check(
    model: str, adapter: Path | None, prompts: Path | None, device: str
) -> "tuple[HFPolicy, PolicyReport]":
    from blockroll.policies.hf import HFPolicy
    from blockroll.policies.loading import resolve_checkpoint
    from blockroll.policy_check.check import check_policy

    has_tokenizer = (resolve_checkpoint(model) / "tokenizer_config.json").is_file()
    policy = HFPolicy.from_pretrained(model, device=device, with_tokenizer=has_tokenizer, adapter=adapter)
    texts = () if prompts is None else prompts_from(prompts, policy)
    return policy, check_policy(policy, prompts=texts)


def _report_fields(report: "PolicyReport") -> dict[str, Any]:
    return {
        "subject": report.subject,
        "passed": report.passed,
        "checks": [
            {
                "name": each.name,
                "passed": each.passed,
                "measured": each.measured if each.measured is None or isfinite(each.measured) else None,
                "allowed": each.allowed,
                "is_minimum": each.is_minimum,
                "detail": each.detail,
            }
            for each in report.results
        ],
        "not_checked": list(report.not_checked),
        "conclusion": report.conclusion,
    }


def _print_report(model: str, report: "PolicyReport", console: Console) -> None:
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


def _machine() -> Iterator[tuple[str, str]]:
    import torch

    from blockroll.kernels.choice import choose

    is_cuda = torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "device", torch.cuda.get_device_name() if is_cuda else "cpu (no accelerator that torch can use)"
    yield "cores", str(cores)
    yield "torch threads", str(torch.get_num_threads())
    yield "OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "not set")
    yield "kernels", str(choose("auto", torch.device("cuda" if is_cuda else "cpu")))


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    yield "blockroll", blockroll.__version__
    for package in ("torch", "transformers", *EXTRAS):
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "missing"


def _trial() -> Rollout:
    """One short greedy rollout of the shipped policy."""
    policy = load_policy("tiny", "auto", threads=1)
    sampling = Sampling(temperature=0.0, max_tokens=16)
    engine, requests = engine_for(policy, "two_forward", "12+35-7=?\n", sampling, seed=0, num_samples=1)
    return stream(engine, policy, requests[0], Console(quiet=True), is_styled=False, mark=False)
