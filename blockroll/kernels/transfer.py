"""Numbers between host and device: what the host sends is one copy, what it needs to know one wait.

A device works behind the host, which waits only where it asks for numbers. On a CPU both share memory, and
asking costs nothing: `is_free` says so, and is the one place that decides which form of a computation runs,
that which looks at numbers to do less, or that which never looks.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def is_free(device: torch.device) -> bool:
    """Whether the host can read and write tensors there without a wait."""
    return device.type == "cpu"


def send(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """These arrays, int64 or float64, as tensors there: one copy, behind which the host does not wait."""
    if is_free(device):
        return [torch.from_numpy(each) for each in arrays]
    flat = np.concatenate([np.ascontiguousarray(each).view(np.int64).ravel() for each in arrays])
    staged = torch.from_numpy(flat)
    if device.type == "cuda":
        staged = staged.pin_memory()
    parts = torch.split(staged.to(device, non_blocking=True), [each.size for each in arrays])
    return [
        (part if each.dtype == np.int64 else part.view(torch.float64)).view(each.shape)
        for part, each in zip(parts, arrays, strict=True)
    ]


def sent(integers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """These integers as a tensor there, sent alike: `torch.tensor` waits until a GPU has them."""
    return send([np.array(integers, dtype=np.int64)], device)[0]


def fetch(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """These tensors of one device, (B,) or (B, N), int64, float64 or bool, on the host: one wait for all."""
    if is_free(tensors[0].device):
        return [each.numpy() for each in tensors]
    columns = [each.view(len(each), -1) if each.dim() == 1 else each for each in tensors]
    packed = torch.cat(
        [each.view(torch.int64) if each.dtype == torch.float64 else each.long() for each in columns], dim=1
    )
    packed_BN: np.ndarray = packed.cpu().numpy()
    arrays, first = [], 0
    for tensor, column in zip(tensors, columns, strict=True):
        part: np.ndarray[Any, Any] = packed_BN[:, first : first + column.shape[1]]
        if tensor.dtype == torch.float64:
            part = part.view(np.float64)
        elif tensor.dtype == torch.bool:
            part = part.astype(np.bool_)
        arrays.append(part[:, 0] if tensor.dim() == 1 else part)
        first += column.shape[1]
    return arrays
