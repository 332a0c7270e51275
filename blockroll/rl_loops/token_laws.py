"""Log-probabilities of sampled tokens from hidden states, in pieces whose logits fit a memory bound.

Shapes: N tokens, W hidden width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Head = Callable[[Tensor], Tensor]

# Float32 numbers per token and vocabulary entry that are there at once, forward and backward: logits, their
# soft cap, over temperature, log-softmax, and the gradients of two of these.
BYTES_PER_LOGIT = 6 * 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLaws:
    """The learner's own view of sampled tokens, at each rollout's sampling temperature."""

    logprobs_N: Tensor  # float32, with gradient if asked for
    entropies_N: Tensor  # float32, nats, without gradient


def token_laws(
    head: Head,
    hidden_NW: Tensor,
    tokens_N: Tensor,
    temperatures_N: Tensor,
    *,
    parameters: Sequence[Tensor],
    vocab_size: int,
    memory_bytes: int,
) -> TokenLaws:
    """`log softmax(head(hidden) / temperature)` at the tokens, and that law's entropy.

    `head` maps states (n, W) to float32 logits (n, V), each row by itself; `parameters` are all it has. All
    logits at once take about 24 NV bytes. Where that is more than `memory_bytes`, pieces of the tokens follow
    one another (of at least one), and logits are computed once more for the gradient instead of being kept.
    The results are the same up to the rounding of a head that sees fewer rows at once.
    """
    rows = max(1, memory_bytes // (BYTES_PER_LOGIT * vocab_size))
    if len(tokens_N) <= rows:
        logprobs_N, entropies_N = _laws(head, hidden_NW, tokens_N, temperatures_N)
    else:
        logprobs_N, entropies_N = _Pieces.apply(head, rows, tokens_N, temperatures_N, hidden_NW, *parameters)  # type: ignore[no-untyped-call]
    return TokenLaws(logprobs_N=logprobs_N, entropies_N=entropies_N)


def _laws(head: Head, hidden_NW: Tensor, tokens_N: Tensor, temperatures_N: Tensor) -> tuple[Tensor, Tensor]:
    logprobs_NV = (head(hidden_NW) / temperatures_N[:, None]).log_softmax(dim=-1)
    with torch.no_grad():
        entropies_N = -(logprobs_NV.exp() * logprobs_NV).sum(dim=-1)
    return logprobs_NV.gather(-1, tokens_N[:, None]).squeeze(-1), entropies_N


class _Pieces(torch.autograd.Function):
    """`_laws` of a few rows after another.

    `torch.utils.checkpoint` would hold what it computed in cycles, until garbage is collected.
    """

    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        rows: int,
        tokens_N: Tensor,
        temperatures_N: Tensor,
        hidden_NW: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.head, ctx.rows, ctx.kind = head, rows, hidden_NW.device.type
        ctx.autocast = torch.is_autocast_enabled(ctx.kind), torch.get_autocast_dtype(ctx.kind)
        ctx.save_for_backward(tokens_N, temperatures_N, hidden_NW, *parameters)
        logprobs_N = torch.empty(len(tokens_N), device=hidden_NW.device)
        entropies_N = torch.empty_like(logprobs_N)
        for piece in _slices(len(tokens_N), rows):
            logprobs_N[piece], entropies_N[piece] = _laws(
                head, hidden_NW[piece], tokens_N[piece], temperatures_N[piece]
            )
        ctx.mark_non_differentiable(entropies_N)
        return logprobs_N, entropies_N

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        tokens_N, temperatures_N, hidden_NW, *parameters = ctx.saved_tensors
        gradient_N = gradients[0]
        hidden_gradient_NW = torch.empty_like(hidden_NW)
        sums: list[Tensor | None] = [None] * len(parameters)
        trained = [index for index, parameter in enumerate(parameters) if parameter.requires_grad]
        is_autocast, dtype = ctx.autocast
        for piece in _slices(len(tokens_N), ctx.rows):
            with torch.enable_grad(), torch.autocast(ctx.kind, dtype=dtype, enabled=is_autocast):
                states = hidden_NW[piece].detach().requires_grad_()
                logprobs, _ = _laws(ctx.head, states, tokens_N[piece], temperatures_N[piece])
            wanted = [states, *(parameters[index] for index in trained)]
            found = torch.autograd.grad(logprobs, wanted, gradient_N[piece])
            hidden_gradient_NW[piece] = found[0]
            for index, gradient in zip(trained, found[1:], strict=True):
                so_far = sums[index]
                sums[index] = gradient if so_far is None else so_far.add_(gradient)
        return None, None, None, None, hidden_gradient_NW, *sums


def _slices(count: int, rows: int) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, count, rows))
