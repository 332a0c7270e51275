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
    return Fetch(tensors).read()


class Fetch:
    """Tensors on their way to the host, as `fetch` takes them: queued by now, waited for by `read` alone.

    What is queued behind is not waited for.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._copied = tensors, None
        device = tensors[0].device
        if is_free(device):
            return
        columns = [each.view(len(each), -1) if each.dim() == 1 else each for each in tensors]
        self._widths = [each.shape[1] for each in columns]
        self._packed_BN = torch.cat(
            [each.view(torch.int64) if each.dtype == torch.float64 else each.long() for each in columns],
            dim=1,
        )
        if device.type == "cuda":
            there = torch.empty(self._packed_BN.shape, dtype=torch.int64, pin_memory=True)
            self._packed_BN = there.copy_(self._packed_BN, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def read(self) -> list[np.ndarray]:
        """Their numbers, in the order given."""
        tensors = self._tensors
        if is_free(tensors[0].device):
            return [each.numpy() for each in tensors]
        if self._copied is not None:
            self._copied.synchronize()
        packed_BN: np.ndarray = self._packed_BN.cpu().numpy()
        arrays, first = [], 0
        for tensor, width in zip(tensors, self._widths, strict=True):
            part: np.ndarray[Any, Any] = packed_BN[:, first : first + width]
            if tensor.dtype == torch.float64:
                part = part.view(np.float64)
            elif tensor.dtype == torch.bool:
                part = part.astype(np.bool_)
            arrays.append(part[:, 0] if tensor.dim() == 1 else part)
            first += width
        return arrays
