"""Options that commands share, and loading the policy they name."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from blockroll.policies.hf import HFPolicy

PolicyOption = Annotated[
    str, typer.Option(help="A Hugging Face checkpoint folder, or 'tiny' for the policy that ships.")
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
TemperatureOption = Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")]
ThreadsOption = Annotated[int, typer.Option(min=0, help="torch threads; 0 leaves torch's own choice.")]
BackendOption = Annotated[
    Literal["ray", "local"], typer.Option(help="Replicas as Ray actors, or in this process.")
]
WandbOption = Annotated[bool, typer.Option("--wandb", help="Also log to Weights & Biases.")]


def load_policy(path: str, device: str, threads: int, adapter: Path | None = None) -> "HFPolicy":
    import torch

    from blockroll.policies.hf import HFPolicy

    if threads:
        torch.set_num_threads(threads)
    return HFPolicy.from_pretrained(path, device=device, adapter=adapter)
