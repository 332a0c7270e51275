"""Which form of the operations runs: their definitions in plain torch, or Triton's.

Doors ask `is_triton`. Whoever runs forwards says which it is, once for all that happens inside (`using`), as
`torch.nn.attention.sdpa_kernel` does for torch's own attention.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, get_args

import torch

from blockroll.errors import InvalidInput, MissingDependency

Kernels = Literal["auto", "reference", "triton"]
Form = Literal["reference", "triton"]

OLDEST_TRITON = (3, 6)

_running: ContextVar[Form] = ContextVar("blockroll_kernels", default="reference")


@dataclass(frozen=True, slots=True)
class Chosen:
    """What runs on a device, and why."""

    form: Form
    reason: str

    def __str__(self) -> str:
        return f"{self.form} ({self.reason})"


@contextmanager
def using(form: Form) -> Iterator[None]:
    """Inside, operations run in this form."""
    before = _running.set(form)
    try:
        yield
    finally:
        _running.reset(before)


def is_triton() -> bool:
    """Whether an operation is to run as Triton's."""
    return _running.get() == "triton"


def choose(kernels: Kernels, device: torch.device) -> Chosen:
    """What `kernels` comes to on a device; `auto` is Triton where that is a GPU it can compile for.

    InvalidInput for a word that is none of the three, and for `triton` on a device that it does not serve;
    MissingDependency for `triton` where it is missing or too old.
    """
    if kernels not in get_args(Kernels):
        raise InvalidInput(f"kernels is {kernels!r}; allowed are 'auto', 'reference' and 'triton'")
    if kernels == "reference":
        return Chosen("reference", "asked for")
    if device.type == "cpu" and (kernels == "auto" or not is_interpreted()):
        reason = "on a CPU the definitions run: Triton compiles for GPUs"
        if kernels == "triton":
            raise InvalidInput(
                f"kernels is 'triton', and the policy is on {device}: {reason}; use 'auto', or set "
                "TRITON_INTERPRET=1 before the process starts to have kernels interpreted, which takes long"
            )
        return Chosen("reference", reason)
    installed = _triton_version()
    problem = _problem(installed, device)
    if problem is not None:
        if kernels == "triton":
            raise MissingDependency(f"kernels is 'triton', and {problem}; use 'auto' to do without it")
        return Chosen("reference", problem)
    where = "interpreted" if device.type == "cpu" else _device_name(device)
    return Chosen("triton", f"Triton {installed}, {where}")


def is_interpreted() -> bool:
    """Whether Triton runs kernels step by step on a CPU, rather than compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_version() -> str | None:
    for package in ("triton", "pytorch-triton-rocm", "pytorch-triton"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def _problem(installed: str | None, device: torch.device) -> str | None:
    """Why Triton cannot run there; None: it can."""
    oldest = ".".join(map(str, OLDEST_TRITON))
    if installed is None:
        return f"Triton is missing: builds of torch for GPUs bring it, or install triton>={oldest}"
    if tuple(map(int, installed.split(".")[:2])) < OLDEST_TRITON:
        return f"Triton {installed} is too old: install triton>={oldest}, or a torch that brings it"
    if device.type not in ("cpu", "cuda"):
        return f"Triton's kernels serve NVIDIA's and AMD's GPUs, and the policy is on {device}"
    return None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
