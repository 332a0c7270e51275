"""`selective_logprob` in Triton: no logits reach memory forward, and backward those of few entries at a time.

Sums are float32, in an order that depends on nothing but the shapes: equal calls give equal bits, and forward
a token's law is the same whichever tokens are beside it.

Shapes: N tokens, W hidden width, V vocabulary, S sections of it, C entries whose gradients are there at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from blockroll.kernels.builds import Build
from blockroll.kernels.selective_logprob.fused_tiles import (
    COUNTS,
    FLOAT,
    INTERPRETED,
    JOINED_ROWS,
    MAX_SECTIONS,
    ODD,
    Tiles,
    add_product,
    gradients_of_logits,
    join,
    sections,
    tiles_of,
)
from blockroll.kernels.selective_logprob.reference import OutputHead, TokenLaws


def laws_of_states(
    states_NW: Tensor,
    head: OutputHead,
    tokens_N: Tensor,
    temperature_N: Tensor,
    with_entropy: bool,
    memory_bytes: int,
) -> TokenLaws:
    """As `reference.laws_of_states`, in float32.

    Operands are of the head's type, or of autocast's; what they give is summed and kept in float32. The
    gradient goes through a buffer of `memory_bytes`, or of one tile's entries for all tokens if that is more.
    """
    kind = states_NW.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight_VW.dtype
    logprobs_N, entropies_N = _Laws.apply(
        dtype,
        head.softcap or 0.0,
        with_entropy,
        memory_bytes,
        tokens_N,
        temperature_N,
        states_NW,
        head.weight_VW,
        head.bias_V,
    )
    return TokenLaws(logprobs_N, entropies_N)


class _Laws(torch.autograd.Function):
    """Keeps what was given and the log of each token's sum, and makes the rest once more for the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        dtype: torch.dtype,
        softcap: float,
        with_entropy: bool,
        memory_bytes: int,
        tokens_N: Tensor,
        temperature_N: Tensor,
        states_NW: Tensor,
        weight_VW: Tensor,
        bias_V: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        logits = _Logits.of(dtype, softcap, tokens_N, temperature_N, states_NW, weight_VW, bias_V)
        logprobs_N, entropies_N, log_sums_N = _laws(logits, with_entropy)
        ctx.dtype, ctx.softcap, ctx.memory_bytes = dtype, softcap, memory_bytes
        ctx.save_for_backward(log_sums_N, tokens_N, temperature_N, states_NW, weight_VW, bias_V)
        ctx.mark_non_differentiable(entropies_N)
        return logprobs_N, entropies_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        log_sums_N, *given = ctx.saved_tensors
        with torch.autocast(log_sums_N.device.type, enabled=False):
            logits = _Logits.of(ctx.dtype, ctx.softcap, *given)
            gradient_N = gradients[0].float().contiguous()
            is_needed = ctx.needs_input_grad[-3:]
            found = _gradients(logits, log_sums_N, gradient_N, ctx.memory_bytes, is_needed)
            of_given = zip(found, given[-3:], strict=True)
            return (*[None] * 6, *(each if each is None else each.to(of.dtype) for each, of in of_given))


@dataclass(frozen=True, slots=True)
class _Logits:
    """What logits are made of, in the types in which kernels read it."""

    tokens_N: Tensor
    temperature_N: Tensor
    states_NW: Tensor
    weight_VW: Tensor
    bias_V: Tensor | None
    softcap: float  # 0: none
    tiles: Tiles

    @classmethod
    def of(
        cls,
        dtype: torch.dtype,
        softcap: float,
        tokens_N: Tensor,
        temperature_N: Tensor,
        states_NW: Tensor,
        weight_VW: Tensor,
        bias_V: Tensor | None,
    ) -> "_Logits":
        return cls(
            tokens_N.contiguous(),
            temperature_N.float().contiguous(),
            states_NW.to(dtype),
            weight_VW.to(dtype),
            None if bias_V is None else bias_V.float().contiguous(),
            softcap,
            tiles_of(
                is_half=dtype.itemsize == 2,
                is_even=_is_even(states_NW.shape[1], states_NW.stride(0), weight_VW.stride(0)),
                is_amd=torch.version.hip is not None,
            ),
        )

    @property
    def num_blocks(self) -> int:
        return -(-len(self.tokens_N) // self.tiles.rows)

    def launch(self, kernel: Any, num_columns: int, *outputs: Tensor, **counts: int) -> None:
        """A program for each block of tokens, as many times as there are columns."""
        tiles, (num_rows, width) = self.tiles, self.states_NW.shape
        kernel[(self.num_blocks, num_columns)](
            self.states_NW,
            self.weight_VW,
            self.temperature_N if self.bias_V is None else self.bias_V,
            self.tokens_N,
            self.temperature_N,
            *outputs,
            num_rows=num_rows,
            vocab_size=len(self.weight_VW),
            width=width,
            state_stride=self.states_NW.stride(0),
            weight_stride=self.weight_VW.stride(0),
            has_bias=int(self.bias_V is not None),
            softcap=self.softcap,
            **counts,
            BLOCK_N=tiles.rows,
            BLOCK_V=tiles.entries,
            BLOCK_W=tiles.depth,
            EVEN=tiles is not ODD,
            UP=INTERPRETED,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )


def _laws(logits: _Logits, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies, and logs of sums."""
    num_rows, vocab_size, entries = len(logits.tokens_N), len(logits.weight_VW), logits.tiles.entries
    # A token outside the vocabulary, which no section finds, gets NaN.
    chosen_N = torch.full_like(logits.temperature_N, torch.nan)
    logprobs_N, log_sums_N = torch.empty_like(chosen_N), torch.empty_like(chosen_N)
    entropies_N = torch.empty_like(chosen_N if with_entropy else chosen_N[:0])
    if num_rows == 0:
        return logprobs_N, entropies_N, log_sums_N
    num_tiles = triton.cdiv(triton.cdiv(vocab_size, entries), MAX_SECTIONS)
    num_sections = triton.cdiv(vocab_size, num_tiles * entries)
    maxima_NS, sums_NS = (chosen_N.new_empty(num_rows, num_sections) for _ in range(2))
    moments_NS = torch.empty_like(maxima_NS if with_entropy else maxima_NS[:0])
    counts = {"num_sections": num_sections, "with_entropy": int(with_entropy)}
    parts = (maxima_NS, sums_NS, moments_NS, chosen_N)
    logits.launch(sections, num_sections, *parts, num_tiles=num_tiles, **counts)
    join[(triton.cdiv(num_rows, JOINED_ROWS),)](
        *parts,
        logprobs_N,
        entropies_N,
        log_sums_N,
        num_rows=num_rows,
        **counts,
        BLOCK_N=JOINED_ROWS,
        BLOCK_S=MAX_SECTIONS,
    )
    return logprobs_N, entropies_N, log_sums_N


def _gradients(
    logits: _Logits, log_sums_N: Tensor, gradient_N: Tensor, memory_bytes: int, is_needed: Sequence[bool]
) -> list[Tensor | None]:
    """Of states, weight and bias, where they are needed."""
    states_NW, weight_VW, tiles = logits.states_NW, logits.weight_VW, logits.tiles
    num_rows, vocab_size = len(states_NW), len(weight_VW)
    of_states_NW = torch.zeros_like(states_NW, dtype=torch.float32) if is_needed[0] else None
    of_weight_VW = torch.empty_like(weight_VW) if is_needed[1] else None
    of_bias_V = log_sums_N.new_empty(vocab_size) if is_needed[2] else None
    if num_rows == 0:
        return [each if each is None else each.zero_() for each in (of_states_NW, of_weight_VW, of_bias_V)]
    num_tiles = max(1, memory_bytes // (num_rows * weight_VW.itemsize * tiles.entries))
    num_entries = min(num_tiles, triton.cdiv(vocab_size, tiles.entries)) * tiles.entries
    buffer_NC = weight_VW.new_empty(num_rows, num_entries)
    for first in range(0, vocab_size, num_entries):
        last = min(first + num_entries, vocab_size)
        num_tiles = triton.cdiv(last - first, tiles.entries)
        given = (log_sums_N, gradient_N, buffer_NC)
        logits.launch(gradients_of_logits, num_tiles, *given, first=first, out_stride=num_entries)
        some_NC = buffer_NC[:, : last - first]
        if of_states_NW is not None:
            _add_product(of_states_NW, buffer_NC, logits, first, num_tiles * tiles.entries)
        if of_weight_VW is not None:
            torch.mm(some_NC.T, states_NW, out=of_weight_VW[first:last])
        if of_bias_V is not None:
            torch.sum(some_NC, dim=0, dtype=torch.float32, out=of_bias_V[first:last])
    return [of_states_NW, of_weight_VW, of_bias_V]


def _add_product(out_NW: Tensor, buffer_NC: Tensor, logits: _Logits, first: int, num_entries: int) -> None:
    """Add what some entries give to the gradient of the states."""
    weight_VW, tiles = logits.weight_VW, logits.tiles
    if weight_VW.dtype == torch.float32:
        some_VW = weight_VW[first : first + num_entries]
        out_NW.addmm_(buffer_NC[:, : len(some_VW)], some_VW)
        return
    width = out_NW.shape[1]
    add_product[(logits.num_blocks, triton.cdiv(width, tiles.entries))](
        buffer_NC,
        weight_VW,
        out_NW,
        num_rows=len(out_NW),
        vocab_size=len(weight_VW),
        width=width,
        depth=num_entries,
        left_stride=buffer_NC.stride(0),
        weight_stride=weight_VW.stride(0),
        first=first,
        BLOCK_N=tiles.rows,
        BLOCK_W=tiles.entries,
        BLOCK_K=tiles.depth,
        UP=INTERPRETED,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def _is_even(*sizes: int) -> bool:
    return all(size % 64 == 0 for size in sizes)


def builds() -> Iterator[Build]:
    """Every way in which these kernels ship: by type, evenness of widths, and vendor where that matters."""
    for kind in ("bf16", "fp32"):
        for is_even, vendor in ((True, "NVIDIA"), (True, "AMD"), (False, "any")):
            tiles = tiles_of(is_half=kind == "bf16", is_even=is_even, is_amd=vendor == "AMD")
            if tiles is FLOAT and vendor == "AMD":
                continue  # the same as for NVIDIA
            label = f"{kind}, {'even' if is_even else 'odd'} width, {'any' if tiles is FLOAT else vendor}"
            size = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
            blocks = {"BLOCK_N": tiles.rows, "BLOCK_V": tiles.entries, "BLOCK_W": tiles.depth}
            for kernel in (sections, gradients_of_logits):
                yield _build(kernel, label, kind, is_even, {**blocks, "EVEN": is_even}, **size)
            if kind == "bf16":
                cut = {"BLOCK_N": tiles.rows, "BLOCK_W": tiles.entries, "BLOCK_K": tiles.depth}
                yield _build(add_product, label, kind, is_even, cut, **size)
    yield _build(join, "any", "fp32", True, {"BLOCK_N": JOINED_ROWS, "BLOCK_S": MAX_SECTIONS})


def _build(
    kernel: Any, label: str, kind: str, is_even: bool, constants: dict[str, Any], **size: int
) -> Build:
    constants = constants | ({"UP": False} if "UP" in kernel.arg_names else {})
    operands = dict.fromkeys(("states", "weight", "left"), f"*{kind}")
    operands["out"] = "*fp32" if kernel is add_product else f"*{kind}"
    numbers = {
        name: "i32" for name in kernel.arg_names if name in COUNTS or name.endswith(("width", "stride"))
    }
    known = operands | numbers | {"softcap": "fp32", "tokens": "*i64"} | dict.fromkeys(constants, "constexpr")
    types = {name: known.get(name, "*fp32") for name in kernel.arg_names}
    even = {"width", "state_stride", "weight_stride"} if is_even else set()
    aligned = {name for name, kind in types.items() if kind[0] == "*"} | even | {"out_stride", "left_stride"}
    return Build(
        label=f"{kernel.fn.__name__} {label}",
        kernel=kernel,
        types=types,
        constants=constants,
        aligned=frozenset(aligned & types.keys()),
        **size,
    )
