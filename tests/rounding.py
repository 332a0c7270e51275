"""Another machine's rounding: linear layers whose last bits depend on the shape and the process.

On CPUs whose kernels differ by batch size, a row of a batch does not get the bits it gets alone. Tests that
hold here by luck, because kernels happen to agree, fail under this as they would there.
"""

import os

import torch
from torch import Tensor
from torch.nn import functional

_linear = functional.linear
_factors: dict[tuple[int, int], Tensor] = {}


def disturb() -> None:
    """From now on every float32 linear layer of this process rounds as one of another machine."""
    functional.linear = _disturbed


def _disturbed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = _linear(x, weight, bias)
    return y * _factor(y.numel() // max(1, y.shape[-1]), y.shape[-1]) if y.dtype == torch.float32 else y


def _factor(num_rows: int, width: int) -> Tensor:
    """One unit in the last place up, down or none, by column; another pattern for each number of rows."""
    key = (num_rows, width)
    if key not in _factors:
        generator = torch.Generator().manual_seed(hash((os.getpid(), num_rows, width)) % 2**31)
        with torch.inference_mode(False):
            _factors[key] = 1 + torch.randint(-1, 2, (width,), generator=generator) * 2.0**-23
    return _factors[key]
