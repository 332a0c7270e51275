"""Linear weights a second time, in the layout in which a CPU multiplies few rows fastest.

A decode step reads every weight for a handful of rows, and the ordinary layout takes up to twice the time of
one that is blocked for the processor's vector units. The module's parameters stay what they are: weights are
written into them, checksums are of them, and gradients flow through them. The packed copies are made of them
whenever they have changed, and serve inside `serving()` alone, where no gradient is recorded.

Memory: as much again as the packed weights take (`num_bytes`), the output head's included.

Source: oneDNN's blocked weights, through the operators that torch's own compiler packs constants with.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockroll.errors import InvalidInput

logger = logging.getLogger(__name__)

Prepack = Literal["auto", "on", "off"]

PACKED_DTYPES = (torch.float32, torch.bfloat16)
# Modules of one parent that every family gives the same input: one product serves all of them.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_LEAST_NUMBERS = 1 << 18  # of a weight under `auto`: below, calling costs more than multiplying
_ROWS = 8  # of the products that are timed, beside those of one row
_MOST_TIMED = 8  # groups of a shape
_TURNS = 3  # of which the best counts
_LEAST_GAIN = 0.95  # of the time, or it is not worth its memory
_LOGPROB_BOUND = {torch.float32: 1e-4, torch.bfloat16: 0.25}  # as `check_policy` allows
_LIKELY = 1e-3  # below float32, rarer tokens round too coarsely to be compared


class PackedLinears:
    """The packed copies of one model's linear weights. They are made at the first `serving()`."""

    def __init__(self, model: nn.Module, prepack: Prepack, law: Callable[[], Tensor]) -> None:
        """`law` gives logits (..., V) of some rows of the model, to see that packed ones are the same.

        InvalidInput where it must be on and cannot be.
        """
        self._model, self._law = model, law
        self._groups: list[_Group] | None = None  # None: not decided yet
        self.prepack: Prepack = prepack
        if prepack == "on" and not _packable(model):
            raise InvalidInput(
                "prepack is 'on', but packed weights need a CPU, a torch with oneDNN, and linear weights in "
                "float32 or bfloat16, as far as the processor takes them; set it to 'auto', which packs "
                "where it can"
            )

    @property
    def num_bytes(self) -> int:
        """Memory of the copies; 0 while there are none."""
        return sum(group.num_bytes for group in self._groups or ())

    def refresh(self) -> None:
        """The weights have been written: copies that are there are made anew."""
        if not all(group.is_packable for group in self._groups or ()):
            self._groups = None  # moved to another device or type: decided anew by the next forward
        for group in self._groups or ():
            group.pack()

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Products of the model's linear modules are made of the packed copies inside this block."""
        if any(group.is_stale for group in self._groups or ()):
            self.refresh()
        if self._groups is None:
            try:
                self._groups = self._decided()
            except BaseException:
                self._groups = None  # not decided: the next forward does
                raise
        with _patched(self._groups):
            yield

    def _decided(self) -> "list[_Group]":
        """Packed groups, where packing is asked for, gains time and leaves the law the same."""
        self._groups = []  # forwards that this asks for meet none
        if self.prepack == "off":
            return []
        least = 0 if self.prepack == "on" else _LEAST_NUMBERS
        groups = [group for group in _packable(self._model) if group.num_numbers >= least]
        if not groups:
            return []
        if self.prepack == "auto":
            timed = _sample(groups)
            for group in timed:
                group.pack()
            if not _is_faster(timed, _ROWS):
                logger.info("linear weights are not packed: on this processor that gains nothing")
                return []
            if not _is_faster(timed, 1):
                for group in groups:
                    group.least_rows = 2
        started = time.perf_counter()
        for group in groups:
            group.pack()
        seconds = time.perf_counter() - started
        gap, bound = self._gap(groups)
        if not gap <= bound:  # NaN is no agreement
            logger.warning(
                "packed weights are off: log-probabilities move by %.1e with them, and %.1e is allowed",
                gap,
                bound,
            )
            return []
        logger.info(
            "linear weights are packed a second time: %.0f MB, %.2f s at every update",
            sum(group.num_bytes for group in groups) / 1e6,
            seconds,
        )
        return groups

    def _gap(self, groups: "Sequence[_Group]") -> tuple[float, float]:
        """How far log-probabilities lie apart with packed weights, and how far they may."""
        expected = self._law()
        with _patched(groups):
            found = self._law()
        return law_gap(expected, found, groups[0].dtype)


class _Group:
    """Linear modules with the same input, and the packed weight that serves all of them."""

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        self.modules = tuple(modules)
        self.least_rows = 1  # with fewer the ordinary weights are as fast
        self._sizes = [module.out_features for module in modules]
        self._packed: Tensor | None = None
        self._bias: Tensor | None = None
        self._stamps: list[tuple[int, int]] = []
        self._made: tuple[Tensor, Sequence[Tensor]] | None = None  # an input, and every module's output

    @property
    def num_numbers(self) -> int:
        return sum(module.weight.numel() for module in self.modules)

    @property
    def num_bytes(self) -> int:
        return self.num_numbers * self.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        return self.modules[0].weight.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.modules[0].in_features, *self._sizes)

    @property
    def is_stale(self) -> bool:
        """Whether any parameter has been written in place, moved or exchanged since it was packed."""
        return self._stamps != self._stamps_now()

    @property
    def is_packable(self) -> bool:
        return all(map(_is_packable, self.modules))

    def pack(self) -> None:
        """Make the copy of the parameters as they are now."""
        with torch.inference_mode(False), torch.no_grad():
            weights = [module.weight.detach() for module in self.modules]
            biases = [module.bias.detach() for module in self.modules if module.bias is not None]
            whole = weights[0] if len(weights) == 1 else torch.cat(weights)
            self._packed = torch.ops.mkldnn._reorder_linear_weight(whole.contiguous())
            self._bias = torch.cat(biases) if biases else None
        self._stamps = self._stamps_now()

    def product(self, x: Tensor) -> Tensor:
        """Of rows (..., in) with all weights: (..., the sum of out)."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return product

    def forward(self, index: int, x: Tensor) -> Tensor:
        """What one of the modules gives for an input."""
        module = self.modules[index]
        if torch.is_grad_enabled():  # another thread's
            return F.linear(x, module.weight, module.bias)
        if x.numel() < self.least_rows * x.shape[-1]:
            return F.linear(x, module.weight, module.bias)
        if len(self.modules) == 1:
            return self.product(x)
        if index == 0:
            self._made = (x, torch.split(self.product(x), self._sizes, dim=-1))
        made = self._made
        if made is None or made[0] is not x:
            return F.linear(x, module.weight, module.bias)
        if index == len(self.modules) - 1:
            self._made = None  # nothing outlives the layer
        return made[1][index]

    def _stamps_now(self) -> list[tuple[int, int]]:
        tensors = [
            tensor
            for module in self.modules
            for tensor in (module._parameters["weight"], module._parameters["bias"])
            if tensor is not None
        ]
        return [(tensor._version, tensor.data_ptr()) for tensor in tensors]


def law_gap(expected: Tensor, found: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """How far log-probabilities of logits (..., V) lie apart, and how far weights of a type let them."""
    expected, found = expected.log_softmax(dim=-1), found.log_softmax(dim=-1)
    gaps = (found - expected).abs()
    if dtype != torch.float32:
        gaps = gaps[~(expected.exp() <= _LIKELY)]
    return float(gaps.max()) if gaps.numel() else 0.0, _LOGPROB_BOUND[dtype]


def is_packed_forward(forward: object) -> bool:
    """Whether a module's own `forward` is its product with a packed weight, inside `serving()`."""
    return isinstance(forward, partial) and isinstance(getattr(forward.func, "__self__", None), _Group)


@contextmanager
def _patched(groups: Sequence[_Group]) -> Iterator[None]:
    """The modules compute by their groups inside, and are untouched outside: copies of them are ordinary."""
    placed: list[dict[str, object]] = []
    try:
        for group in groups:
            for index, module in enumerate(group.modules):
                own = module.__dict__
                if "forward" not in own:
                    own["forward"] = partial(group.forward, index)
                    placed.append(own)
        yield
    finally:
        for own in placed:
            own.pop("forward", None)


def _packable(model: nn.Module) -> list[_Group]:
    """Groups of the model's linear modules whose weights can be packed; none off a CPU."""
    has_packing = torch._C._has_mkldnn and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )
    if not has_packing:
        return []
    groups: list[_Group] = []
    seen: set[nn.Module] = set()
    for parent in model.modules():
        for names in _SIBLINGS:
            siblings = [each for name in names if _is_packable(each := getattr(parent, name, None))]
            if len(siblings) == len(names) and len({_kind(each) for each in siblings}) == 1:
                groups.append(_Group(siblings))
                seen.update(siblings)
    groups += [_Group([module]) for module in model.modules() if _is_packable(module) and module not in seen]
    return groups


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies with packed weights of a type; older ones refuse bfloat16."""
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype))
        torch.ops.mkldnn._linear_pointwise(torch.zeros(1, 16, dtype=dtype), packed, None, "none", [], "")
    except RuntimeError as refusal:
        logger.info("linear weights in %s are not packed: %s", dtype, refusal)
        return False
    return True


def _is_packable(module: object) -> TypeGuard[nn.Linear]:
    """Only what computes nothing but its product: wrapped or subclassed modules stay as they are."""
    return type(module) is nn.Linear and _is_packable_weight(module._parameters.get("weight"))


def _is_packable_weight(weight: Tensor | None) -> bool:
    return (
        type(weight) is nn.Parameter  # no shard, and nothing that is computed of others
        and weight.device.type == "cpu"
        and weight.dtype in PACKED_DTYPES
        and can_pack(weight.dtype)
        and not weight.is_inference()  # their writes are not counted
        and weight.numel() > 0
    )


def _kind(module: nn.Linear) -> tuple[object, ...]:
    """What modules must have in common to be one product."""
    return module.in_features, module.weight.dtype, module.bias is None


def _sample(groups: Sequence[_Group]) -> list[_Group]:
    """Some of every shape that layers repeat: more numbers than a processor's cache holds, if there are."""
    by_shape: dict[tuple[int, ...], list[_Group]] = {}
    for group in groups:
        by_shape.setdefault(group.shape, []).append(group)
    return [group for each in by_shape.values() if len(each) > 1 for group in each[:_MOST_TIMED]] or [
        groups[0]
    ]


def _is_faster(groups: Sequence[_Group], num_rows: int) -> bool:
    """Whether products of so many rows take less time with these packed weights."""
    inputs = [torch.ones((num_rows, group.shape[0]), dtype=group.dtype) for group in groups]

    def packed() -> None:
        for group, x in zip(groups, inputs, strict=True):
            group.product(x)

    def plain() -> None:
        for group, x in zip(groups, inputs, strict=True):
            for module in group.modules:
                F.linear(x, module.weight, module.bias)

    pairs = [(seconds_of(packed), seconds_of(plain)) for _ in range(_TURNS)]
    return min(pair[0] for pair in pairs) <= _LEAST_GAIN * min(pair[1] for pair in pairs)


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
