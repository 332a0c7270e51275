"""Options that commands share, and loading the policy they name."""

import functools
import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from blockroll.config import Backend
from blockroll.errors import InvalidInput
from blockroll.types import SamplingOptions
from blockroll.types.bounds import hints_of, sentence_of

if TYPE_CHECKING:
    from blockroll.policies.hf import HFPolicy

PolicyOption = Annotated[
    str,
    typer.Option(
        help="A checkpoint folder, a Hugging Face Hub id, or 'tiny' for the untrained start that ships."
    ),
]
AdapterOption = Annotated[
    Path | None,
    typer.Option(
        help="The folder of a draft adapter, as convert makes it; one beside the policy is used unasked."
    ),
]
DeviceOption = Annotated[
    str, typer.Option(help="torch device; 'auto' takes the accelerator if there is one.")
]
SeedOption = Annotated[int, typer.Option(help="Equal seeds give equal tokens under one plan.")]
ThreadsOption = Annotated[
    int, typer.Option(min=0, max=1024, help="torch threads; 0 leaves torch's own choice.")
]
BackendOption = Annotated[Backend, typer.Option(help="Replicas as Ray actors, or in this process.")]
WandbOption = Annotated[bool, typer.Option("--wandb", help="Also log to Weights & Biases.")]
MetricsPortOption = Annotated[
    int | None,
    typer.Option(
        "--metrics-port",
        min=0,
        max=65535,
        metavar="PORT",
        help="Serve the newest metrics to Prometheus on this port, to this machine alone.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead, one object a line.")]


def with_sampling(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command every option of `SamplingOptions`; it takes the values as `sampling`, a mapping.

    Help is the sentence of the field, and `Sampling` itself refuses what is out of bounds.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(name, getattr(SamplingOptions(), name)),
                annotation=Annotated[get_args(hint)[0], typer.Option(help=_as_help(hint))],
            )
            for name, hint in hints_of(SamplingOptions).items()
        ]

        @functools.wraps(command)
        def with_options(**values: Any) -> None:
            sampling = {each.name: values.pop(each.name) for each in added}
            command(**values, sampling=sampling)

        own = inspect.signature(command).parameters.values()
        kept = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own if each.name != "sampling"]
        with_options.__signature__ = inspect.Signature([*kept, *added])  # type: ignore[attr-defined]
        with_options.__annotations__ = {each.name: each.annotation for each in (*kept, *added)}
        return with_options

    return decorate


def _as_help(hint: Any) -> str:
    sentence = sentence_of(hint)
    return f"{sentence[:1].upper()}{sentence[1:]}."


def check_output(option: str, path: Path, *, is_folder: bool = False) -> None:
    """Refuse before hours of work what could not be written after them."""
    if not is_folder and path.is_dir():
        raise InvalidInput(f"{option} {path} is a folder: give a file")
    if not is_folder and not path.parent.is_dir():
        raise InvalidInput(f"{option} {path}: there is no folder {path.parent}")
    there = path.absolute()
    while not there.exists():
        there = there.parent
    if is_folder and not there.is_dir():
        raise InvalidInput(f"{option} {path} cannot be made: {there} is a file")
    try:
        tempfile.TemporaryFile(dir=there if there.is_dir() else there.parent).close()
    except OSError as error:
        raise InvalidInput(f"{option} {path} cannot be written in {there}: {error.strerror}") from None


def load_policy(
    path: str, device: str, threads: int, adapter: Path | None = None, *, dtype: str = "float32"
) -> "HFPolicy":
    import torch

    from blockroll.policies.hf import HFPolicy

    if threads:
        torch.set_num_threads(threads)
    return HFPolicy.from_pretrained(path, device=device, dtype=dtype, adapter=adapter)
