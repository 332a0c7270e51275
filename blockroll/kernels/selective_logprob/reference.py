"""The definition of `selective_logprob`, and how it runs on a CPU: piece by piece, logits made twice.

Shapes: N tokens, W hidden width, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Numbers per token and vocabulary entry that are there at once, forward and backward: logits, their soft cap,
# over temperature, log-softmax, and the gradients of two of these.
NUMBERS_PER_LOGIT = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputHead:
    """What makes logits of hidden states, each row by itself."""

    weight_VW: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None  # c bends logits to c * tanh(logit / c)

    def logits(self, states_NW: Tensor) -> Tensor:
        """Logits (N, V) as the head multiplies, in its own precision or autocast's; float32 at least."""
        logits_NV = F.linear(states_NW.to(self.weight_VW.dtype), self.weight_VW, self.bias_V)
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()


class TokenLaws(NamedTuple):
    """Of each token, in nats: what carries a gradient, and what does not."""

    logprobs_N: Tensor
    entropies_N: Tensor  # of the law it was given by, without gradient; (0,) where not asked for


def laws_of_logits(
    logits_NV: Tensor, tokens_N: Tensor, temperature_N: Tensor, with_entropy: bool
) -> TokenLaws:
    """log softmax(logits / temperature) at the tokens: the definition."""
    logprobs_NV = (logits_NV / temperature_N[:, None]).log_softmax(dim=-1)
    with torch.no_grad():
        asked_NV = logprobs_NV if with_entropy else logprobs_NV[:0]
        entropies_N = -(asked_NV.exp() * asked_NV).sum(dim=-1)
    return TokenLaws(logprobs_NV.gather(-1, tokens_N[:, None]).squeeze(-1), entropies_N)


def laws_of_states(
    states_NW: Tensor,
    head: OutputHead,
    tokens_N: Tensor,
    temperature_N: Tensor,
    with_entropy: bool,
    num_rows: int,
) -> TokenLaws:
    """The same of logits that are made for `num_rows` tokens at a time, and for the gradient once more."""
    if len(tokens_N) <= num_rows:
        return laws_of_logits(head.logits(states_NW), tokens_N, temperature_N, with_entropy)
    logprobs_N, entropies_N = _Pieces.apply(  # type: ignore[no-untyped-call]
        num_rows,
        with_entropy,
        head.softcap,
        tokens_N,
        temperature_N,
        states_NW,
        head.weight_VW,
        head.bias_V,
    )
    return TokenLaws(logprobs_N, entropies_N)


class _Pieces(torch.autograd.Function):
    """Keeps what was given, and makes logits of a piece once more for the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        num_rows: int,
        with_entropy: bool,
        softcap: float | None,
        tokens_N: Tensor,
        temperature_N: Tensor,
        states_NW: Tensor,
        weight_VW: Tensor,
        bias_V: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        kind = states_NW.device.type
        ctx.num_rows, ctx.softcap, ctx.kind = num_rows, softcap, kind
        ctx.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        ctx.save_for_backward(tokens_N, temperature_N, states_NW, weight_VW, bias_V)
        head = OutputHead(weight_VW=weight_VW, bias_V=bias_V, softcap=softcap)
        found = [
            laws_of_logits(head.logits(states_NW[piece]), tokens_N[piece], temperature_N[piece], with_entropy)
            for piece in _pieces(len(tokens_N), num_rows)
        ]
        logprobs_N = torch.cat([each.logprobs_N for each in found])
        entropies_N = torch.cat([each.entropies_N for each in found])
        ctx.mark_non_differentiable(entropies_N)
        return logprobs_N, entropies_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        tokens_N, temperature_N, states_NW, weight_VW, bias_V = ctx.saved_tensors
        is_autocast, autocast_dtype = ctx.autocast
        dtype = autocast_dtype if is_autocast else weight_VW.dtype
        head = OutputHead(weight_VW=weight_VW.to(dtype), bias_V=bias_V, softcap=ctx.softcap)
        of_states, of_weight, of_bias = ctx.needs_input_grad[-3:]
        # Sums over pieces are in the precision of the logits, and made in place: no second one is there.
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        states_gradient_NW = torch.empty_like(states_NW) if of_states else None
        weight_gradient_VW = torch.zeros_like(weight_VW, dtype=exact) if of_weight else None
        bias_gradient_V = torch.zeros_like(bias_V, dtype=exact) if of_bias else None
        for piece in _pieces(len(tokens_N), ctx.num_rows):
            with torch.autocast(ctx.kind, dtype=autocast_dtype, enabled=is_autocast):
                logits_NV = head.logits(states_NW[piece])
            given = (tokens_N[piece], temperature_N[piece], gradients[0][piece])
            gradient_NV = logit_gradients(logits_NV, ctx.softcap, *given).to(dtype)
            if states_gradient_NW is not None:
                states_gradient_NW[piece] = gradient_NV @ head.weight_VW
            if weight_gradient_VW is not None:
                weight_gradient_VW.addmm_(gradient_NV.T.to(exact), states_NW[piece].to(dtype).to(exact))
            if bias_gradient_V is not None:
                bias_gradient_V += gradient_NV.sum(dim=0, dtype=exact)
            del logits_NV, gradient_NV  # before the next piece makes its own
        found = (states_gradient_NW, weight_gradient_VW, bias_gradient_V)
        of_given = zip(found, (states_NW, weight_VW, bias_V), strict=True)
        return (*[None] * 5, *(each if each is None else each.to(of.dtype) for each, of in of_given))


def logit_gradients(
    logits_NV: Tensor, softcap: float | None, tokens_N: Tensor, temperature_N: Tensor, gradient_N: Tensor
) -> Tensor:
    """Of logits before their cap, from the gradient of the tokens' log-probabilities; the logits are used up.

    A token's is (1 if it is the chosen one - its probability) / temperature, times 1 - tanh^2 of a cap.
    """
    factor_N1 = (gradient_N / temperature_N).to(logits_NV.dtype)[:, None]
    gradient_NV = (logits_NV / temperature_N[:, None]).softmax(dim=-1).mul_(-factor_N1)
    gradient_NV.scatter_add_(-1, tokens_N[:, None], factor_N1)
    if softcap is not None:
        gradient_NV.mul_(logits_NV.div_(softcap).square_().neg_().add_(1))
    return gradient_NV


def _pieces(count: int, num_rows: int) -> Iterator[slice]:
    return (slice(start, start + num_rows) for start in range(0, count, num_rows))
