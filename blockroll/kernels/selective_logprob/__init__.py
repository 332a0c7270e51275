"""Log-probabilities of given tokens, and entropies, without logits of all rows at once.

Shapes: N tokens, W hidden width, V vocabulary.
"""

import torch
from torch import Tensor

from blockroll.errors import InvalidInput
from blockroll.kernels.choice import is_triton
from blockroll.kernels.selective_logprob import reference
from blockroll.kernels.selective_logprob.reference import NUMBERS_PER_LOGIT, OutputHead, TokenLaws

SERVED_TYPES = (torch.float32, torch.bfloat16)
MAX_VOCABULARY = 2**31

__all__ = ["OutputHead", "TokenLaws", "logprob_of_logits", "rows_within", "selective_logprob"]


def selective_logprob(
    states_NW: Tensor,
    head: OutputHead,
    tokens_N: Tensor,
    temperature_N: Tensor,
    *,
    memory_bytes: int,
    with_entropy: bool = False,
) -> TokenLaws:
    """`log softmax(head(states) / temperature)` at the tokens, and that law's entropy if it is asked for.

    Float32 or float64 (N,). All logits at once take about 24 NV bytes. Where that is more than
    `memory_bytes`, pieces of the tokens follow one another (of at least one), and logits are computed once
    more for the gradient instead of being kept. The results are the same up to the rounding of a product of
    fewer rows. Gradients reach the states and the head. InvalidInput where shapes do not belong together.

    Triton keeps no logits: forward none reach memory, and backward `memory_bytes` bounds the gradients of
    logits that are there at once. It multiplies in float32 or bfloat16, sums and gives float32; InvalidInput
    for other types, for rows that are not contiguous, and for 2^31 entries or more.
    """
    _check(states_NW, tokens_N, temperature_N, "states_NW", head.weight_VW.shape[1])
    if is_triton():
        _check_served(states_NW, head)
        from blockroll.kernels.selective_logprob import fused

        return fused.laws_of_states(states_NW, head, tokens_N, temperature_N, with_entropy, memory_bytes)
    num_rows = rows_within(memory_bytes, head.weight_VW.shape[0])
    return reference.laws_of_states(states_NW, head, tokens_N, temperature_N, with_entropy, num_rows)


def logprob_of_logits(
    logits_NV: Tensor, tokens_N: Tensor, temperature_N: Tensor, *, with_entropy: bool = False
) -> TokenLaws:
    """The same of logits that are there, in their precision, in plain torch whichever form is chosen."""
    _check(logits_NV, tokens_N, temperature_N, "logits_NV", logits_NV.shape[-1])
    return reference.laws_of_logits(logits_NV, tokens_N, temperature_N, with_entropy)


def rows_within(memory_bytes: int, vocab_size: int) -> int:
    """Tokens whose logits fit so many bytes together, at least one."""
    return max(1, memory_bytes // (NUMBERS_PER_LOGIT * torch.float32.itemsize * vocab_size))


def _check(rows: Tensor, tokens_N: Tensor, temperature_N: Tensor, name: str, width: int) -> None:
    size = tokens_N.numel()
    if rows.shape != (size, width) or tokens_N.shape != (size,) or temperature_N.shape != (size,):
        raise InvalidInput(
            f"{name} has shape {tuple(rows.shape)}, tokens_N {tuple(tokens_N.shape)} and temperature_N "
            f"{tuple(temperature_N.shape)}; give a row of {width} numbers, a token, a temperature for each "
            "of N tokens"
        )
    if tokens_N.dtype != torch.int64 or not temperature_N.is_floating_point():
        raise InvalidInput(
            f"tokens_N is {tokens_N.dtype} and temperature_N {temperature_N.dtype}: give int64 tokens and "
            "temperatures in a floating-point type"
        )


def _check_served(states_NW: Tensor, head: OutputHead) -> None:
    """InvalidInput for what no kernel was built for."""
    kind = states_NW.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight_VW.dtype
    if dtype not in SERVED_TYPES:
        raise InvalidInput(
            f"the head multiplies in {dtype}, and Triton's kernels in float32 or bfloat16: convert the "
            "model, or set kernels='reference'"
        )
    for name, rows in (("states_NW", states_NW), ("head.weight_VW", head.weight_VW)):
        if rows.stride(1) != 1 and rows.shape[1] > 1:
            raise InvalidInput(
                f"{name} has strides {rows.stride()}: Triton's kernels read rows whose numbers lie side by "
                "side; give its .contiguous(), or set kernels='reference'"
            )
    if len(head.weight_VW) >= MAX_VOCABULARY:
        raise InvalidInput(
            f"the head has {len(head.weight_VW)} entries, and Triton's kernels count fewer than "
            f"{MAX_VOCABULARY}: set kernels='reference'"
        )
