"""Teaching a policy to draft: convert."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from blockroll.cli.options import DeviceOption, PolicyOption, SeedOption, ThreadsOption
from blockroll.config import ConvertConfig, from_mapping, with_overrides
from blockroll.errors import InvalidInput


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
