"""Which accelerators the ranks of a trainer own, and how they are kept from Ray."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


def device_names(device: torch.device) -> list[str]:
    """The accelerator that a rank trains on, as host:index; none on a CPU."""
    if device.type != "cuda":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    index = device.index or 0
    return [f"{socket.gethostname()}:{visible.split(',')[index] if visible else index}"]


@contextmanager
def hidden(owned: Sequence[str]) -> Iterator[None]:
    """Ray that starts here sees only accelerators of this host that no rank owns."""
    host, before = socket.gethostname(), os.environ.get("CUDA_VISIBLE_DEVICES")
    mine = {name.removeprefix(f"{host}:") for name in owned if name.startswith(f"{host}:")}
    if mine:
        every = before.split(",") if before else map(str, range(torch.cuda.device_count()))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(each for each in every if each not in mine)
    try:
        yield
    finally:
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        elif mine:
            del os.environ["CUDA_VISIBLE_DEVICES"]
