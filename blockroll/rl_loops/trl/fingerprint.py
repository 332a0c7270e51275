"""Which weights a trainer's model holds: fingerprints are equal if a forward would multiply with the same.

It reads every bit of this rank's parameters once, as a forward does. Counters that torch keeps of writes in
place would be cheaper and miss what goes through `.data`: optimizers, DeepSpeed, a checkpoint that is loaded.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from blockroll.rl_loops.trl.modules import describe_tuners

Fingerprint = tuple[Any, ...]

_WIDTH = 1024


@torch.no_grad()
def fingerprint(model: nn.Module, *, beside: Iterable[Tensor] = ()) -> Fingerprint:
    """Of all parameters of `model` and the tensors `beside`; of sharded ones, what lies on this rank.

    Two sums for each tensor, of its bits by row and by column of a fixed width, both with odd weights: a
    change of one value, an exchange of two, and a permutation of rows change them.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward the outermost may lie whole, and would look like another
    sums = [_sums_of(_local(tensor)) for tensor in (*model.parameters(), *beside)]
    devices = {each.device for each in sums}
    by_device = [torch.stack([each for each in sums if each.device == device]) for device in devices]
    values = tuple(value for stacked in by_device for row in stacked.tolist() for value in row)
    return (values, describe_tuners(model))


def _local(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    shard: Tensor = getattr(tensor, "ds_tensor", tensor)  # DeepSpeed's ZeRO 3 leaves the parameter empty
    return shard


def _sums_of(tensor: Tensor) -> Tensor:
    """Two 64-bit sums (2,) of a tensor's bits, on its device."""
    bytes_N = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if bytes_N.storage_offset() % 8:
        bytes_N = bytes_N.clone()
    padded_N = bytes_N[: len(bytes_N) // 8 * 8].view(torch.int64)  # other widths are summed 100 times slower
    if len(bytes_N) % 8:
        last_N = nn.functional.pad(bytes_N[len(padded_N) * 8 :], (0, -len(bytes_N) % 8))
        padded_N = torch.cat([padded_N, last_N.view(torch.int64)])
    num_rows = len(padded_N) // _WIDTH
    head_RW, tail_N = padded_N[: num_rows * _WIDTH].view(num_rows, _WIDTH), padded_N[num_rows * _WIDTH :]
    columns_W = head_RW.sum(0)
    columns_W[: len(tail_N)] += tail_N
    return torch.stack([_weighted(columns_W), _weighted(head_RW.sum(1))])


def _weighted(values_N: Tensor) -> Tensor:
    odd_N = 2 * torch.arange(len(values_N), device=values_N.device) + 1
    return (values_N * odd_N).sum()
