"""Counts every moment at which the host would wait for a device: each read of a tensor's numbers.

Run on a CPU, where such a read is free: what is counted is what a GPU would be waited for. Whatever asks for
numbers counts, or for a shape that depends on them. What comes of `.cpu()`, or is made of
numbers, is the host's and read freely; what is made of that is not. A device that is no string cannot be told
from another: `.to(tensor.device)` is no read.
"""

import sys
import weakref
from collections import Counter
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {
    *("item", "tolist", "numpy", "cpu", "__array__", "__bool__", "__int__", "__float__", "__index__"),
    *("__complex__", "__contains__", "__format__", "__repr__", "is_nonzero", "equal", "allclose"),
    *("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "histc"),
    *("assert_close", "assert_equal"),
}  # fmt: skip
_SENDS = {"tensor", "as_tensor", "asarray", "from_numpy", "scalar_tensor"}
_INDEXED = {"__getitem__", "__setitem__", "index", "index_put", "index_put_", "_index_put_impl_"}
_READ_OPS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy"),
    *("argwhere", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount"),
    *("histc",),
}  # fmt: skip


class Waits(TorchFunctionMode):
    """While it is entered: `reads` and `sends` by what they are and where, innermost line of the package."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.sends: Counter[str] = Counter()
        self._host: dict[int, weakref.ref[Tensor]] = {}
        self._depth = 0  # inside a call that is counted already
        self._below = _Below(self)

    @property
    def num_reads(self) -> int:
        """All of them."""
        return self.reads.total()

    @property
    def num_sends(self) -> int:
        """Times that numbers of the host were made a tensor."""
        return self.sends.total()

    def __enter__(self) -> Self:
        self._below.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._below.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if self._depth or self._is_host(args):
            return func(*args, **kwargs)
        counted = None
        if name in _SENDS and not any(map(_is_tensor, args)):
            counted = self.sends
            if any(_is_tensor(each) for value in args for each in _flat(value)):
                self.reads[f"{name} of tensors{_place()}"] += 1
        elif name in _READS or _waits(name, args, kwargs):
            counted = self.reads
        if counted is None:
            return func(*args, **kwargs)
        counted[f"{name}{_place()}"] += 1
        self._depth += 1
        try:
            result = func(*args, **kwargs)
        finally:
            self._depth -= 1
        if isinstance(result, Tensor):
            self._host[id(result)] = weakref.ref(result)
        return result

    def below(self, name: str, args: Any, kwargs: Any) -> None:
        """An operation of a device that was reached without a call that is counted."""
        if not self._depth and not self._is_host(args) and (name in _READ_OPS or _waits(name, args, kwargs)):
            self.reads[f"aten.{name}{_place()}"] += 1

    def _is_host(self, args: Any) -> bool:
        first = args[0] if args else None
        reference = self._host.get(id(first))
        return reference is not None and reference() is first


class _Below(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._waits.below(func.overloadpacket.__name__.removeprefix("aten."), args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a call waits by what it is given."""
    if name in _INDEXED and len(args) > 1:
        return any(_is_tensor(each) and each.dtype in (torch.bool, torch.uint8) for each in _flat(args[1]))
    if name == "where":
        return len(args) + len(kwargs) == 1
    if name == "repeat_interleave":
        repeats = args[-1] if len(args) < 2 else args[1]
        return _is_tensor(kwargs.get("repeats", repeats)) and kwargs.get("output_size") is None
    if name == "to":
        return "cpu" in [each for each in (*args[1:], kwargs.get("device")) if isinstance(each, str)]
    return name == "copy_" and args[0].device.type == "cpu" != args[1].device.type


def _flat(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _place() -> str:
    """The innermost line of the package that is being run."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/blockroll/" in name and "/tests/" not in name:
            return f" at {name.rpartition('/blockroll/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
