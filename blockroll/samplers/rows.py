"""The laws of positions, held as what they come from; probabilities are formed where a token is judged.

A vocabulary of 49,152 makes B x L x V probabilities the dearest part of a step. Rows of logits stay as the
forward gave them: a tile of rows at a time is made into float64 probabilities, read, and forgotten. They are
the same numbers, bit for bit, as those of all rows at once.

Shapes: B requests, L rows, N of these rows from the first on, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from blockroll.samplers.processing import Cut, mixed_logits, truncate
from blockroll.types import Rows

_TILE = 1 << 18  # probabilities that are formed at once: 2 MB, which stay in a core's cache


class Drawn(NamedTuple):
    """Tokens drawn by inverse CDF, and where in the cumulative weights each was found; float64 (B,)."""

    token_ids_B: Tensor  # int64
    low_B: Tensor  # weights of all ids before the token,
    high_B: Tensor  # the token's own included,
    mass_B: Tensor  # and of all ids


@dataclass(frozen=True, slots=True)
class DenseRows(Rows):
    """Probabilities that are there already: of few rows, or of a small vocabulary."""

    probs_BLV: Tensor  # float64

    @property
    def shape(self) -> torch.Size:
        return self.probs_BLV.shape

    def probs_of(self, token_ids_BN: Tensor) -> Tensor:
        return self.probs_BLV[:, : token_ids_BN.shape[1]].gather(-1, token_ids_BN[..., None]).squeeze(-1)

    def at(self, requests_N: Tensor, offsets_N: Tensor) -> Tensor:
        return self.probs_BLV[requests_N, offsets_N]

    def behind_first(self) -> Self:
        return replace(self, probs_BLV=self.probs_BLV[:, 1:])

    def draw(self, uniforms_BL: Tensor) -> Tensor:
        return inverse_cdf(self.probs_BLV, uniforms_BL)

    def dense(self) -> Tensor:
        return self.probs_BLV


@dataclass(frozen=True, slots=True)
class Mix:
    """Draft rows of which a part enters the rows they were met by, as `mixed_logits` has it."""

    draft_logits_BKV: Tensor
    weight_B: Tensor
    num_drafts_B: Tensor

    def of_all(self, logits_BLV: Tensor) -> Tensor:
        """All rows, mixed: float64."""
        return mixed_logits(logits_BLV, self.draft_logits_BKV, self.weight_B, self.num_drafts_B)

    def tile(self, place: tuple[slice, slice], logits_BLV: Tensor) -> Tensor:
        """These rows of these requests."""
        requests, rows = place
        num_drafts_B = self.num_drafts_B[requests] - rows.start
        return mixed_logits(logits_BLV, self.draft_logits_BKV[place], self.weight_B[requests], num_drafts_B)

    def at(self, requests_N: Tensor, offsets_N: Tensor, logits_N1V: Tensor) -> Tensor:
        """These rows, each of a request and at an offset."""
        met_N = offsets_N < self.num_drafts_B[requests_N]
        place_N = offsets_N.clamp(max=self.draft_logits_BKV.shape[1] - 1)
        draft_N1V = self.draft_logits_BKV[requests_N, place_N][:, None]
        return mixed_logits(logits_N1V, draft_N1V, self.weight_B[requests_N], met_N.long())

    def behind_first(self) -> "Mix | None":
        """That of all rows but the first of each request; None: nothing is left to mix."""
        if self.draft_logits_BKV.shape[1] < 2:
            return None
        return Mix(self.draft_logits_BKV[:, 1:], self.weight_B, self.num_drafts_B - 1)


@dataclass(frozen=True, slots=True)
class LogitRows(Rows):
    """softmax(logits / temperature), a point mass where the temperature is 0; mixed and cut where asked."""

    logits_BLV: Tensor
    temperature_B: Tensor
    has_greedy: bool  # whether any temperature is 0
    cut: Cut | None = None  # None: no request is truncated,
    mix: Mix | None = None  # or mixes

    @property
    def shape(self) -> torch.Size:
        return self.logits_BLV.shape

    def probs_of(self, token_ids_BN: Tensor) -> Tensor:
        probs_BN = torch.empty(token_ids_BN.shape, dtype=torch.float64, device=token_ids_BN.device)
        for place, probs_11V in self._tiles(token_ids_BN.shape[1]):
            probs_BN[place] = probs_11V.gather(-1, token_ids_BN[place][..., None]).squeeze(-1)
        return probs_BN

    def logprobs_of(self, token_ids_BN: Tensor) -> Tensor:
        """Their logarithms, also where a probability is too small for float64; no temperature is 0.

        Of rows as they are: neither truncated nor mixed.
        """
        logprobs_BN = torch.empty(token_ids_BN.shape, dtype=torch.float64, device=token_ids_BN.device)
        for place in self._places(token_ids_BN.shape[1]):
            scaled_BLV = _scaled(self.logits_BLV[place], self.temperature_B[place[0]])
            own_BL = scaled_BLV.gather(-1, token_ids_BN[place][..., None]).squeeze(-1)
            # The best token's probability is no less than 1 / V: log-sum-exp by one softmax, which is faster.
            best_BL = scaled_BLV.amax(dim=-1)
            logprobs_BN[place] = own_BL - best_BL + scaled_BLV.softmax(dim=-1).amax(dim=-1).log()
        return logprobs_BN

    def at(self, requests_N: Tensor, offsets_N: Tensor) -> Tensor:
        logits_N1V = self.logits_BLV[requests_N, offsets_N][:, None]
        if self.mix is not None:
            logits_N1V = self.mix.at(requests_N, offsets_N, logits_N1V)
        return self._law(logits_N1V, requests_N)[:, 0]

    def behind_first(self) -> Self:
        mix = None if self.mix is None else self.mix.behind_first()
        return replace(self, logits_BLV=self.logits_BLV[:, 1:], mix=mix)

    def dense(self) -> Tensor:
        return self._law(self.logits(), slice(None))

    def logits(self) -> Tensor:
        """What the softmax is taken of; float64 (B, L, V) where any request mixes."""
        return self.logits_BLV if self.mix is None else self.mix.of_all(self.logits_BLV)

    def draw(self, uniforms_BL: Tensor) -> Tensor:
        token_ids_BL = torch.empty(uniforms_BL.shape, dtype=torch.int64, device=uniforms_BL.device)
        for place, probs_11V in self._tiles(uniforms_BL.shape[1]):
            token_ids_BL[place] = inverse_cdf(probs_11V, uniforms_BL[place])
        return token_ids_BL

    def _tiles(self, num_rows: int) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
        """The law of the first rows of each request, some at a time, and which they are."""
        for place in self._places(num_rows):
            logits_BLV = self.logits_BLV[place]
            if self.mix is not None:
                logits_BLV = self.mix.tile(place, logits_BLV)
            yield place, self._law(logits_BLV, place[0])

    def _law(self, logits_BLV: Tensor, requests: slice | Tensor) -> Tensor:
        probs_BLV = target_probs(logits_BLV, self.temperature_B[requests], has_greedy=self.has_greedy)
        return probs_BLV if self.cut is None else truncate(probs_BLV, self.cut.of(requests))

    def _places(self, num_rows: int) -> Iterator[tuple[slice, slice]]:
        """Whole requests, or rows of one where those of one are a tile."""
        size, _, vocab_size = self.shape
        width = max(1, min(num_rows, _TILE // vocab_size))
        for requests in _spans(size, max(1, _TILE // (vocab_size * width))):
            for rows in _spans(num_rows, width):
                yield requests, rows


def held(rows: LogitRows) -> Rows:
    """The same law, held in the cheaper way: what is one tile is formed at once."""
    return DenseRows(rows.dense()) if rows.logits_BLV.numel() <= _TILE else rows


def spans_of_rows(num_rows: int, vocab_size: int) -> Iterator[slice]:
    """Rows of which so many make a tile."""
    yield from _spans(num_rows, max(1, _TILE // vocab_size))


def _spans(size: int, width: int) -> Iterator[slice]:
    for start in range(0, size, width):
        yield slice(start, min(start + width, size))


def target_probs(logits_BLV: Tensor, temperature_B: Tensor, *, has_greedy: bool | None = None) -> Tensor:
    """The law to commit by: float64 (B, L, V) softmax of logits over temperature; a point mass where it is 0.

    Ties of a greedy row go to the lowest id. Who knows whether any temperature is 0 saves a look.
    """
    if has_greedy is None:
        has_greedy = bool((temperature_B == 0).any())
    if not has_greedy:
        return _scaled(logits_BLV, temperature_B).softmax(dim=-1)
    is_greedy_B = temperature_B == 0
    probs = _scaled(logits_BLV, torch.where(is_greedy_B, 1.0, temperature_B)).softmax(dim=-1)
    best = torch.zeros_like(probs).scatter_(-1, logits_BLV.argmax(dim=-1, keepdim=True), 1.0)
    return torch.where(is_greedy_B[:, None, None], best, probs)


def _scaled(logits_BLV: Tensor, temperature_B: Tensor) -> Tensor:
    return logits_BLV.to(torch.float64, copy=True).div_(temperature_B.to(torch.float64)[:, None, None])


def inverse_cdf(weights_V: Tensor, uniforms: Tensor) -> Tensor:
    """The id whose interval of the cumulative weights holds the uniform; never an id without weight.

    `weights_V` (..., V) need not be normalised; `uniforms` (...) lie in (0, 1). One token per row, int64.
    """
    return _search(weights_V.cumsum(dim=-1), uniforms)


def drawn_from(weights_BV: Tensor, uniforms_B: Tensor) -> Drawn:
    """As `inverse_cdf`, with the interval that held each uniform."""
    cumulative_BV = weights_BV.cumsum(dim=-1)
    token_ids_B = _search(cumulative_BV, uniforms_B)
    before_B = (token_ids_B - 1).clamp(min=0)
    low_B = cumulative_BV.gather(-1, before_B[:, None]).squeeze(-1)
    return Drawn(
        token_ids_B=token_ids_B,
        low_B=torch.where(token_ids_B > 0, low_B, 0.0),
        high_B=cumulative_BV.gather(-1, token_ids_B[:, None]).squeeze(-1),
        mass_B=cumulative_BV[:, -1],
    )


def _search(cumulative_V: Tensor, uniforms: Tensor) -> Tensor:
    total = cumulative_V[..., -1:].contiguous()
    token = torch.searchsorted(cumulative_V, uniforms[..., None] * total, right=True)
    # Rounding can carry the goal onto the total: the last id with weight is where the total is first reached.
    last = torch.searchsorted(cumulative_V, total)
    return torch.minimum(token, last).squeeze(-1)
