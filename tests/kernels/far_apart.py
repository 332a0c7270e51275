"""Rows so far apart that an int32 cannot count the numbers between them."""

import torch
from triton.runtime.interpreter import GridExecutor

STRIDE = 2**30


def far_apart(given, monkeypatch):
    """A copy of numbers (R, ...), R at least 4, with rows `STRIDE` apart: gigabytes, of which few are used.

    The interpreter works on a CPU's tensors in place, and then copies all of their memory to where it is,
    which would use it: it is kept from that.
    """
    assert len(given) >= 4
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    inner = given[0].numel()
    memory = torch.empty((len(given) - 1) * STRIDE + inner, dtype=given.dtype)
    apart = memory.as_strided(given.shape, (STRIDE, *given[0].stride()))
    apart.copy_(given)
    return apart
