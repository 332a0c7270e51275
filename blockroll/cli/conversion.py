"""Teaching a policy to draft: convert."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from blockroll.cli.options import (
    AdapterOption,
    DeviceOption,
    PolicyOption,
    SeedOption,
    ThreadsOption,
    check_output,
)
from blockroll.config import ConvertConfig, from_mapping, to_mapping, with_overrides
from blockroll.errors import InvalidInput

OPTIONS = {  # of the command line: what they are called in ConvertConfig
    "policy": "policy.path",
    "adapter": "policy.adapter",
    "device": "policy.device",
    "prompts": "prompts",
    "conversion": "draft.conversion",
    "max_tokens": "max_tokens",
    "max_minutes": "max_minutes",
    "replicas": "num_replicas",
    "seed": "seed",
}


def convert(
    ctx: typer.Context,
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[section.field=value ...]",
            help="Any option of ConvertConfig, such as draft.rank=16 or draft.block_sizes=[4,8].",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; it must not exist.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="A conversion's folder, to go on with it: --max-tokens, --max-minutes, --replicas, "
            "--device, patience, min_gain and max_batch_size may change."
        ),
    ] = None,
    policy: PolicyOption = "tiny",
    adapter: AdapterOption = None,
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
    """Teach a policy to draft, on its own answers. Its weights stay, but for --conversion full."""
    import torch

    from blockroll.rl_loops.convert import convert as run_conversion
    from blockroll.rl_loops.convert import load_convert_config

    if threads:
        torch.set_num_threads(threads)
    if out is None and resume is None:
        raise InvalidInput("give --out FOLDER for the adapter, or --resume FOLDER to go on")
    if resume is not None and out is not None and out.resolve() != resume.resolve():
        raise InvalidInput(
            f"--resume {resume} goes on in that folder, got --out {out}: leave one of them out"
        )
    values = {} if resume is None else to_mapping(load_convert_config(resume))
    values["out"] = str(resume or out)
    check_output("--out", Path(values["out"]), is_folder=True)
    for name, key in OPTIONS.items():
        if resume is None or _is_given(ctx, name):
            _set(values, key, ctx.params[name])
    config = from_mapping(ConvertConfig, with_overrides(values, options or []))
    run_conversion(config, resume=resume is not None)


def _is_given(ctx: typer.Context, name: str) -> bool:
    """Whether the option stands on the command line."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Write an option by its dotted name."""
    *sections, leaf = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[leaf] = str(value) if isinstance(value, Path) else value
