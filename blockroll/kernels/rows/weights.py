"""Rows of a law as weights: what tokens are drawn from, and what their probabilities are read from.

Weights of a large vocabulary are a float32 softmax, whose relative error is about 1e-7 near the best token
and 1e-6 far from it. They need not add up to one: sums and probabilities are float64 and are those of the
very weights that tokens are drawn from, so the law that is reported is the law that is drawn from.

Shapes: N rows, M candidates of a row, C blocks of them, A tokens asked for, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 128  # candidates whose sum is searched for before they are


class Drawn(NamedTuple):
    """Tokens drawn by inverse CDF, and where in the cumulative weights each was found; float64 (N,)."""

    token_ids_B: Tensor  # int64
    low_B: Tensor  # weights of all ids before the token,
    high_B: Tensor  # the token's own included,
    mass_B: Tensor  # and of all ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Rows, each of weights that are not negative and of which one is positive."""

    weights_NM: Tensor  # float32 or float64
    mass_N: Tensor | None = None  # float64, what they are divided by; None: they are stated as they are
    sums_NC: Tensor | None = None  # float64, of blocks that are searched first; None: there are none
    ids_NM: Tensor | None = None  # ascending; of no weight behind the last one. None: all of the vocabulary

    @classmethod
    def normalized(cls, weights_NM: Tensor, ids_NM: Tensor | None = None) -> "Weights":
        """Probabilities in proportion to these weights."""
        sums_NC = block_sums(weights_NM)
        return cls(weights_NM=weights_NM, mass_N=sums_NC.sum(dim=-1), sums_NC=sums_NC, ids_NM=ids_NM)

    def probs_of(self, token_ids_NA: Tensor) -> Tensor:
        """Of some tokens of each row, float64 (N, A)."""
        if self.ids_NM is None:
            weights_NA = self.weights_NM.gather(1, token_ids_NA).double()
        else:
            is_asked_NAM = self.ids_NM[:, None] == token_ids_NA[..., None]
            weights_NA = torch.where(is_asked_NAM, self.weights_NM[:, None], 0.0).sum(dim=-1).double()
        return weights_NA if self.mass_N is None else weights_NA / self.mass_N[:, None]

    def best_probs(self) -> Tensor:
        """Of the best token of each row, float64 (N,)."""
        best_N = self.weights_NM.amax(dim=-1).double()
        return best_N if self.mass_N is None else best_N / self.mass_N

    def dense(self, vocab_size: int) -> Tensor:
        """All probabilities, float64 (N, V)."""
        weights_NV = self.weights_NM.double()
        if self.mass_N is not None:
            weights_NV = weights_NV / self.mass_N[:, None]
        if self.ids_NM is None:
            return weights_NV
        # Behind the last candidate of a row stands token 0, without weight: it is added, not written.
        return weights_NV.new_zeros(len(weights_NV), vocab_size).scatter_add_(1, self.ids_NM, weights_NV)

    def draw(self, uniforms_N: Tensor) -> Drawn:
        """The candidate whose interval of the cumulative weights holds the uniform, never one without weight.

        Of `normalized` weights figures are probabilities, of mass 1.
        """
        if self.sums_NC is None:
            drawn = drawn_from(self.weights_NM.double(), uniforms_N)
        else:
            drawn = _drawn_by_blocks(self.weights_NM, self.sums_NC, uniforms_N)
        token_ids_N, low_N, high_N, mass_N = drawn
        if self.ids_NM is not None:
            token_ids_N = self.ids_NM.gather(1, token_ids_N[:, None]).squeeze(1)
        if self.mass_N is not None:
            low_N, high_N, mass_N = low_N / mass_N, high_N / mass_N, torch.ones_like(mass_N)
        return Drawn(token_ids_N, low_N, high_N, mass_N)


def block_sums(weights_NM: Tensor) -> Tensor:
    """Of candidates that follow on one another, float64 (N, C)."""
    size, num_candidates = weights_NM.shape
    num_blocks = num_candidates // _BLOCK
    whole = num_blocks * _BLOCK
    sums = [weights_NM[:, :whole].reshape(size, num_blocks, _BLOCK).sum(dim=-1, dtype=torch.float64)]
    if whole < num_candidates:
        sums.append(weights_NM[:, whole:].sum(dim=-1, keepdim=True, dtype=torch.float64))
    return torch.cat(sums, dim=1) if len(sums) > 1 else sums[0]


def inverse_cdf(weights_V: Tensor, uniforms: Tensor) -> Tensor:
    """The id whose interval of the cumulative weights holds the uniform; never an id without weight.

    `weights_V` (..., V) need not be normalised; `uniforms` (...) lie in (0, 1). One token per row, int64.
    """
    return _search(weights_V.cumsum(dim=-1), uniforms)


def drawn_from(weights_BV: Tensor, uniforms_B: Tensor) -> Drawn:
    """As `inverse_cdf`, with the interval that held each uniform."""
    cumulative_BV = weights_BV.cumsum(dim=-1)
    token_ids_B = _search(cumulative_BV, uniforms_B)
    return Drawn(
        token_ids_B=token_ids_B,
        low_B=_before(cumulative_BV, token_ids_B),
        high_B=_gathered(cumulative_BV, token_ids_B),
        mass_B=cumulative_BV[:, -1],
    )


def _drawn_by_blocks(weights_NM: Tensor, sums_NC: Tensor, uniforms_N: Tensor) -> Drawn:
    """As `drawn_from`: the block that holds the uniform, then the candidate inside it."""
    cumulative_NC = sums_NC.cumsum(dim=-1)
    mass_N = cumulative_NC[:, -1]
    block_N = _search(cumulative_NC, uniforms_N)
    before_N = _before(cumulative_NC, block_N)
    place_NI = block_N[:, None] * _BLOCK + torch.arange(_BLOCK, device=block_N.device)
    last = weights_NM.shape[1] - 1
    inside_NI = weights_NM.gather(1, place_NI.clamp(max=last)).double().masked_fill_(place_NI > last, 0.0)
    cumulative_NI = inside_NI.cumsum(dim=-1)
    offset_N = _found(cumulative_NI, uniforms_N * mass_N - before_N)
    return Drawn(
        token_ids_B=block_N * _BLOCK + offset_N,
        low_B=before_N + _before(cumulative_NI, offset_N),
        high_B=before_N + _gathered(cumulative_NI, offset_N),
        mass_B=mass_N,
    )


def _search(cumulative_V: Tensor, uniforms: Tensor) -> Tensor:
    return _found(cumulative_V, uniforms * cumulative_V[..., -1])


def _found(cumulative_V: Tensor, goals: Tensor) -> Tensor:
    token = torch.searchsorted(cumulative_V, goals[..., None], right=True)
    # Rounding can carry the goal onto the total: the last id with weight is where the total is first reached.
    last = torch.searchsorted(cumulative_V, cumulative_V[..., -1:].contiguous())
    return torch.minimum(token, last).squeeze(-1)


def _gathered(values_NV: Tensor, index_N: Tensor) -> Tensor:
    return values_NV.gather(1, index_N[:, None]).squeeze(1)


def _before(cumulative_NV: Tensor, index_N: Tensor) -> Tensor:
    """What the cumulative weights are before an index."""
    return torch.where(index_N > 0, _gathered(cumulative_NV, (index_N - 1).clamp(min=0)), 0.0)
