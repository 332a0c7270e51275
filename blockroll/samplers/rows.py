"""The laws of positions, held as what they come from; probabilities are formed where a token is judged.

A vocabulary of 49,152 makes B x L x V probabilities the dearest part of a step. Rows of logits stay as the
forward gave them: a tile of rows at a time is made into weights, read, and forgotten. They are the same
numbers, bit for bit, as those of all rows at once, and do not depend on the rows beside them.

Shapes: B requests, L rows, N of these rows from the first on, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from blockroll.samplers.processing import Cut, mixed_logits, truncate, truncated
from blockroll.samplers.weights import Weights, inverse_cdf
from blockroll.types import Rows

_TILE = 1 << 18  # weights that are formed at once: 1 or 2 MB, which stay in a core's cache
_WIDE = 1 << 14  # a vocabulary from which on the softmax of float32 logits is float32


@runtime_checkable
class Weighed(Protocol):
    """Rows that give their laws as weights."""

    def weights_at(self, requests_N: Tensor, offsets_N: Tensor) -> Weights:
        """Of these rows, each of a request and at an offset."""
        ...


def weights_at(rows: Rows, requests_N: Tensor, offsets_N: Tensor) -> Weights:
    """Rows of a law, however it is held."""
    if isinstance(rows, Weighed):
        return rows.weights_at(requests_N, offsets_N)
    return Weights(weights_NM=rows.at(requests_N, offsets_N))


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

    def drawn(self, uniforms_BL: Tensor) -> tuple[Tensor, Self]:
        """As `draw`, and these rows."""
        return self.draw(uniforms_BL), self

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


class Known(NamedTuple):
    """A token of each row, and its probability, float64: (B, L)."""

    token_ids_BL: Tensor
    probs_BL: Tensor


@dataclass(frozen=True, slots=True)
class LogitRows(Rows):
    """softmax(logits / temperature), a point mass where the temperature is 0; mixed and cut where asked."""

    logits_BLV: Tensor
    temperature_B: Tensor
    has_greedy: bool  # whether any temperature is 0
    cut: Cut | None = None  # None: no request is truncated,
    mix: Mix | None = None  # or mixes
    known: "Known | None" = None

    @property
    def shape(self) -> torch.Size:
        return self.logits_BLV.shape

    def probs_of(self, token_ids_BN: Tensor) -> Tensor:
        if self.known is not None and torch.equal(self.known.token_ids_BL, token_ids_BN):
            return self.known.probs_BL
        probs_BN = torch.empty(token_ids_BN.shape, dtype=torch.float64, device=token_ids_BN.device)
        for place, weights in self._tiles(token_ids_BN.shape[1]):
            ids_BN = token_ids_BN[place]
            probs_BN[place] = weights.probs_of(ids_BN.reshape(-1, 1)).view(ids_BN.shape)
        return probs_BN

    def logprobs_of(self, token_ids_BN: Tensor) -> Tensor:
        """Their logarithms, also where a probability is too small for float64; no temperature is 0.

        Of rows as they are: neither truncated nor mixed.
        """
        logprobs_BN = torch.empty(token_ids_BN.shape, dtype=torch.float64, device=token_ids_BN.device)
        for place in self._places(token_ids_BN.shape[1]):
            logits_BLV, temperature_B = self.logits_BLV[place], self.temperature_B[place[0]]
            own_BL = logits_BLV.gather(-1, token_ids_BN[place][..., None]).squeeze(-1)
            best_BL = logits_BLV.amax(dim=-1)
            gap_BL = (own_BL.double() - best_BL.double()) / temperature_B.double()[:, None]
            # The best token's probability is no less than 1 / V: log-sum-exp by one softmax, which is faster.
            of_best_BL = self._weights(logits_BLV, place[0]).best_probs().view(best_BL.shape)
            logprobs_BN[place] = gap_BL + of_best_BL.log()
        return logprobs_BN

    def at(self, requests_N: Tensor, offsets_N: Tensor) -> Tensor:
        return self.weights_at(requests_N, offsets_N).dense(self.shape[-1])

    def weights_at(self, requests_N: Tensor, offsets_N: Tensor) -> Weights:
        """Of these rows, each of a request and at an offset."""
        if self.logits_BLV.is_cpu and is_wide(self.logits_BLV):  # a copy of whole rows, not id by id
            places = zip(requests_N.tolist(), offsets_N.tolist(), strict=True)
            logits_N1V = torch.stack([self.logits_BLV[place] for place in places])[:, None]
        else:
            logits_N1V = self.logits_BLV[requests_N, offsets_N][:, None]
        if self.mix is not None:
            logits_N1V = self.mix.at(requests_N, offsets_N, logits_N1V)
        return self._weights(logits_N1V, requests_N)

    def behind_first(self) -> Self:
        mix = None if self.mix is None else self.mix.behind_first()
        known = None if self.known is None else Known(*(each_BL[:, 1:] for each_BL in self.known))
        return replace(self, logits_BLV=self.logits_BLV[:, 1:], mix=mix, known=known)

    def dense(self) -> Tensor:
        logits_BLV = self.logits()
        return self._weights(logits_BLV, slice(None)).dense(logits_BLV.shape[-1]).view(logits_BLV.shape)

    def logits(self) -> Tensor:
        """What the softmax is taken of; float64 (B, L, V) where any request mixes."""
        return self.logits_BLV if self.mix is None else self.mix.of_all(self.logits_BLV)

    def draw(self, uniforms_BL: Tensor) -> Tensor:
        return self.drawn(uniforms_BL)[0]

    def drawn(self, uniforms_BL: Tensor) -> tuple[Tensor, Self]:
        """As `draw`, and these rows, which know then what the probabilities of these tokens are."""
        token_ids_BL = torch.empty(uniforms_BL.shape, dtype=torch.int64, device=uniforms_BL.device)
        probs_BL = torch.empty_like(uniforms_BL)
        for place, weights in self._tiles(uniforms_BL.shape[1]):
            uniforms = uniforms_BL[place]
            token_ids_N = weights.draw(uniforms.flatten()).token_ids_B
            token_ids_BL[place] = token_ids_N.view(uniforms.shape)
            probs_BL[place] = weights.probs_of(token_ids_N[:, None]).view(uniforms.shape)
        return token_ids_BL, replace(self, known=Known(token_ids_BL, probs_BL))

    def _tiles(self, num_rows: int) -> Iterator[tuple[tuple[slice, slice], Weights]]:
        """The first rows of each request, some at a time, and which they are."""
        for place in self._places(num_rows):
            logits_BLV = self.logits_BLV[place]
            if self.mix is not None:
                logits_BLV = self.mix.tile(place, logits_BLV)
            yield place, self._weights(logits_BLV, place[0])

    def _weights(self, logits_BLV: Tensor, requests: slice | Tensor) -> Weights:
        """Of all these rows, N = B x L."""
        if not is_wide(logits_BLV):
            temperature_B = self.temperature_B[requests]
            probs_BLV = target_probs(logits_BLV, temperature_B, has_greedy=self.has_greedy)
            if self.cut is not None:
                probs_BLV = truncate(probs_BLV, self.cut.of(requests))
            return Weights(weights_NM=probs_BLV.flatten(0, 1))
        if self.cut is None:
            return self._whole(logits_BLV, requests)
        num_rows = logits_BLV.shape[1]
        cut_N = Cut(*(option_B.repeat_interleave(num_rows) for option_B in self.cut.of(requests)))
        return truncated(self._whole(logits_BLV, requests), cut_N)

    def _whole(self, logits_BLV: Tensor, requests: slice | Tensor) -> Weights:
        """As `_weights`, of a large vocabulary, before any row is cut."""
        temperature_B11 = self.temperature_B[requests].to(logits_BLV.dtype)[:, None, None]
        if self.has_greedy:
            is_greedy_B11 = temperature_B11 == 0
            best_BL1 = logits_BLV.argmax(dim=-1, keepdim=True)
            best_BLV = torch.full_like(logits_BLV, -torch.inf).scatter_(-1, best_BL1, 0.0)
            logits_BLV = torch.where(is_greedy_B11, best_BLV, logits_BLV)
            temperature_B11 = torch.where(is_greedy_B11, 1.0, temperature_B11)
        if (temperature_B11 != 1).any():
            # Scaled from the best on: what rounding takes is least where weights are largest.
            logits_BLV = logits_BLV - logits_BLV.amax(dim=-1, keepdim=True)
            logits_BLV.div_(temperature_B11)
        return Weights.normalized(logits_BLV.softmax(dim=-1).flatten(0, 1))

    def _places(self, num_rows: int) -> Iterator[tuple[slice, slice]]:
        """Whole requests, or rows of one where those of one are a tile."""
        size, _, vocab_size = self.shape
        width = max(1, min(num_rows, _TILE // vocab_size))
        for requests in _spans(size, max(1, _TILE // (vocab_size * width))):
            for rows in _spans(num_rows, width):
                yield requests, rows


def held(rows: LogitRows) -> LogitRows | DenseRows:
    """The same law, held in the cheaper way: what is one tile is formed at once.

    Of a large vocabulary no more is formed than is read.
    """
    logits_BLV = rows.logits_BLV
    return rows if is_wide(logits_BLV) or logits_BLV.numel() > _TILE else DenseRows(rows.dense())


def is_wide(rows: Rows | Tensor) -> bool:
    """Whether the vocabulary is so large that no row is formed before it is known to be needed."""
    return rows.shape[-1] >= _WIDE and not isinstance(rows, DenseRows)


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
