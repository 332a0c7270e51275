"""The laws of positions, held as what they come from; probabilities are formed where a token is judged.

A vocabulary of 49,152 makes B x L x V probabilities the dearest part of a step. Rows of logits stay as the
forward gave them: a row at a time is made into weights, read, and forgotten, by compiled code where it serves
(`compiled.py`). They are the same numbers, bit for bit, as those of all rows at once, and do not depend on
the rows beside them.

Shapes: B requests, L rows, N rows, of a request those from the first on, A tokens asked for of a row,
U edited tokens, V vocabulary.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from blockroll.kernels import transfer
from blockroll.kernels.rows.compiled import At, Looked, RowTable, rows_library
from blockroll.kernels.rows.edits import Edits, Mix
from blockroll.kernels.rows.tiles import Tiled
from blockroll.kernels.rows.truncation import Cut, truncate, truncated
from blockroll.kernels.rows.weights import Drawn, Weights, inverse_cdf
from blockroll.types import Rows

_TILE = 1 << 18  # weights that are formed at once: 1 or 2 MB, which stay in a core's cache
_WIDE = 1 << 14  # a vocabulary from which on the softmax of float32 logits is float32
_COLDEST = torch.finfo(torch.float32).tiny  # a temperature below it is this one: logits over it are finite


_Rows = TypeVar("_Rows", bound=Rows)


class Weighed(Rows):
    """Rows that give their laws as weights."""

    @abstractmethod
    def weights_at(self, requests_N: Tensor, offsets_N: Tensor) -> Weights:
        """Of these rows, each of a request and at an offset."""

    @abstractmethod
    def table(self) -> RowTable | None:
        """The same for compiled code; None where it does not serve."""


def table_of(
    logits: Tensor,
    temperature_B: Tensor,
    cut: Cut | None,
    *,
    packed: tuple[Tensor, Tensor] | None = None,
    mix: Mix | None = None,
    edits: Edits | None = None,
) -> RowTable | None:
    """Rows of logits for compiled code; None where it does not serve."""
    drafts = () if mix is None else (mix.draft_logits_BKV,)
    for each in (logits, *drafts):
        if each.dtype != torch.float32 or not transfer.is_free(each.device) or each.stride(-1) != 1:
            return None
    library = rows_library() if is_wide(logits) else None
    if library is None:
        return None
    return RowTable(
        library,
        logits,
        temperature_B,
        packed=packed,
        cut=None if cut is None else cut[:3],
        mix=None if mix is None else (mix.draft_logits_BKV, mix.weight_B, mix.num_drafts_B),
        edits=edits,
    )


def looked_at(rows: Rows, at: At, uniforms_N: Tensor, asked_NA: Tensor | None = None) -> Looked:
    """Of these rows the tokens that uniforms draw, and the probabilities of those asked for."""
    table = rows.table() if isinstance(rows, Weighed) else None
    if table is not None:
        return table.looked(at, 0, uniforms_N, asked_NA)
    found = []
    for span in spans_of_rows(len(uniforms_N), rows.shape[-1]):
        weights = weights_at(rows, at.requests_N[span], at.offsets_N[span])
        asked = None if asked_NA is None else asked_NA[span]
        found.append(looked(weights, weights.draw(uniforms_N[span]), asked))
    return found[0] if len(found) == 1 else Looked(*map(torch.cat, zip(*found, strict=True)))


def looked(weights: Weights, drawn: Drawn, asked_NA: Tensor | None = None) -> Looked:
    """What these rows say of tokens that were drawn, from them or from what is left of them."""
    ids_N1 = drawn.token_ids_B[:, None]
    probs_NA = weights.probs_of(ids_N1 if asked_NA is None else torch.cat([ids_N1, asked_NA], dim=1))
    return Looked(drawn.token_ids_B, probs_NA[:, 0], drawn.low_B, drawn.high_B, drawn.mass_B, probs_NA[:, 1:])


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

    def drawn(self, uniforms_BL: Tensor) -> tuple[Tensor, Self]:
        """A token of each row, by inverse CDF, and these rows."""
        return inverse_cdf(self.probs_BLV, uniforms_BL), self

    def dense(self) -> Tensor:
        return self.probs_BLV


class Known(NamedTuple):
    """A token of each row, and its probability, float64: (B, L)."""

    token_ids_BL: Tensor
    probs_BL: Tensor


@dataclass(frozen=True, slots=True)
class LogitRows(Weighed):
    """softmax(logits / temperature), a point mass at temperature 0; mixed, edited and cut where asked."""

    logits_BLV: Tensor
    temperature_B: Tensor
    has_greedy: bool  # whether any temperature is 0
    cut: Cut | None = None  # None: no request is truncated,
    mix: Mix | None = None  # or mixes,
    edits: Edits | None = None  # or has any logit of its own
    known: Known | None = None
    tiled: Tiled | None = None  # what kernels have read of them

    @property
    def shape(self) -> torch.Size:
        return self.logits_BLV.shape

    def probs_of(self, token_ids_BN: Tensor) -> Tensor:
        known_BN = self.known_of(token_ids_BN)
        if known_BN is not None:
            return known_BN
        table = self.table()
        if table is not None:
            size, width = token_ids_BN.shape
            asked_N1 = token_ids_BN.reshape(-1, 1)
            return table.looked(width, size, asked_NA=asked_N1).asked_NA.view(size, width)
        probs_BN = torch.empty(token_ids_BN.shape, dtype=torch.float64, device=token_ids_BN.device)
        for place, weights in self._tiles(token_ids_BN.shape[1]):
            ids_BN = token_ids_BN[place]
            probs_BN[place] = weights.probs_of(ids_BN.reshape(-1, 1)).view(ids_BN.shape)
        return probs_BN

    def known_of(self, token_ids_BN: Tensor) -> Tensor | None:
        """Probabilities of the very tokens that were drawn from these rows; None: these are others."""
        is_known = self.known is not None and _is_same(self.known.token_ids_BL, token_ids_BN)
        return self.known.probs_BL if self.known is not None and is_known else None

    def logprobs_of(self, token_ids_BN: Tensor) -> Tensor:
        """Their logarithms, also where a probability is too small for float64; no temperature is 0.

        Of rows as they are: neither truncated, edited nor mixed.
        """
        logprobs_BN = torch.empty(token_ids_BN.shape, dtype=torch.float64, device=token_ids_BN.device)
        for place in self._places(token_ids_BN.shape[1]):
            logits_BLV, temperature_B = self.logits_BLV[place], self.temperature_B[place[0]]
            own_BL = logits_BLV.gather(-1, token_ids_BN[place][..., None]).squeeze(-1)
            best_BL = logits_BLV.amax(dim=-1)
            gap_BL = (own_BL.double() - best_BL.double()) / _floored(temperature_B)[:, None]
            # The best token's probability is no less than 1 / V: log-sum-exp by one softmax, which is faster.
            of_best_BL = self._weights(logits_BLV, place[0]).best_probs().view(best_BL.shape)
            logprobs_BN[place] = gap_BL + of_best_BL.log()
        return logprobs_BN

    def logprobs_at(self, at: At, token_ids_N: Tensor) -> Tensor:
        """The same, of a token of each of these rows: float64 (N,)."""
        table = self.table()
        if table is not None:
            return table.looked(at, 0, asked_NA=token_ids_N[:, None], logs=True).asked_NA[:, 0]
        rows = replace(
            self, logits_BLV=self.logits_BLV[at][:, None], temperature_B=self.temperature_B[at.requests_N]
        )
        return rows.logprobs_of(token_ids_N[:, None])[:, 0]

    def at(self, requests_N: Tensor, offsets_N: Tensor) -> Tensor:
        return self.weights_at(requests_N, offsets_N).dense(self.shape[-1])

    def weights_at(self, requests_N: Tensor, offsets_N: Tensor) -> Weights:
        """Of these rows, each of a request and at an offset."""
        table = self.table()
        if table is not None:
            return Weights(weights_NM=table.dense(At(requests_N, offsets_N), 0))
        logits_N1V = self.logits_BLV[requests_N, offsets_N][:, None]
        if self.mix is not None:
            logits_N1V = self.mix.at(requests_N, offsets_N, logits_N1V)
        if self.edits is not None:
            own_N1U = self.edits.logits_BLU[requests_N, offsets_N][:, None]
            logits_N1V = Edits(self.edits.ids_BU[requests_N], own_N1U).put(logits_N1V)
        return self._weights(logits_N1V, requests_N)

    def table(self) -> RowTable | None:
        """The same for compiled code; None where it does not serve."""
        return table_of(self.logits_BLV, self.temperature_B, self.cut, mix=self.mix, edits=self.edits)

    def behind_first(self) -> Self:
        mix = None if self.mix is None else self.mix.behind_first()
        edits = None if self.edits is None else self.edits.of(slice(None), slice(1, None))
        known = None if self.known is None else Known(*(each_BL[:, 1:] for each_BL in self.known))
        tiled = None if self.tiled is None else self.tiled.of(slice(1, None))
        return replace(
            self, logits_BLV=self.logits_BLV[:, 1:], mix=mix, edits=edits, known=known, tiled=tiled
        )

    def dense(self) -> Tensor:
        table = self.table()
        if table is not None:
            return table.dense(self.shape[1], self.shape[0]).view(self.shape)
        logits_BLV = self.logits()
        return self._weights(logits_BLV, slice(None)).dense(logits_BLV.shape[-1]).view(logits_BLV.shape)

    def logits(self) -> Tensor:
        """What the softmax is taken of; float64 (B, L, V) where any request mixes or is edited."""
        logits_BLV = self.logits_BLV if self.mix is None else self.mix.of_all(self.logits_BLV)
        return logits_BLV if self.edits is None else self.edits.put(logits_BLV)

    def logits_of(self, ids_BU: Tensor) -> Tensor:
        """Logits of some tokens in each row, mixed where asked: float64 (B, L, U)."""
        shape = (*self.logits_BLV.shape[:2], ids_BU.shape[1])
        own_BLU = self.logits_BLV.gather(-1, ids_BU[:, None].expand(shape))
        if self.mix is None:
            return own_BLU.double()
        drafts_BKV = self.mix.draft_logits_BKV
        draft_BKU = drafts_BKV.gather(-1, ids_BU[:, None].expand(-1, drafts_BKV.shape[1], -1))
        return replace(self.mix, draft_logits_BKV=draft_BKU).of_all(own_BLU)

    def editable(self) -> Tensor:
        """A copy of `logits`: float64, of a large vocabulary float32, in which compiled code reads them."""
        logits_BLV = self.logits()
        if not is_wide(self.logits_BLV) or self.logits_BLV.dtype != torch.float32:
            return logits_BLV.to(torch.float64, copy=True)
        return logits_BLV.clamp(max=torch.finfo(torch.float32).max).float()

    def as_they_are(self) -> Self:
        """The law of rows that are mixed and edited already."""
        return replace(self, mix=None, edits=None, tiled=None)

    def drawn(self, uniforms_BL: Tensor) -> tuple[Tensor, Self]:
        """A token of each row, by inverse CDF, and these rows, which know then how likely that was."""
        table = self.table()
        if table is not None:
            size, width = uniforms_BL.shape
            looked = table.looked(width, size, uniforms_BL)
            known = Known(looked.token_ids_N.view(size, width), looked.probs_N.reshape(size, width))
            return known.token_ids_BL, replace(self, known=known)
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
            if self.edits is not None:
                logits_BLV = self.edits.of(*place).put(logits_BLV)
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
        cut_N = self.cut.of(requests).by_row(logits_BLV.shape[1])
        return truncated(self._whole(logits_BLV, requests), cut_N)

    def _whole(self, logits_BLV: Tensor, requests: slice | Tensor) -> Weights:
        """As `_weights`, of a large vocabulary, before any row is cut."""
        if logits_BLV.dtype in (torch.bfloat16, torch.float16):  # they stand for the float32 they are
            logits_BLV = logits_BLV.float()
        is_greedy_B11 = self.temperature_B[requests][:, None, None] == 0
        temperature_B11 = _floored(self.temperature_B[requests]).to(logits_BLV.dtype)[:, None, None]
        if self.has_greedy:
            best_BL1 = logits_BLV.argmax(dim=-1, keepdim=True)
            best_BLV = torch.full_like(logits_BLV, -torch.inf).scatter_(-1, best_BL1, 0.0)
            logits_BLV = torch.where(is_greedy_B11, best_BLV, logits_BLV)
            temperature_B11 = torch.where(is_greedy_B11, 1.0, temperature_B11)
        if not transfer.is_free(logits_BLV.device) or (temperature_B11 != 1).any():
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


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory, read in the same way."""
    return (one.data_ptr(), one.shape, one.stride()) == (other.data_ptr(), other.shape, other.stride())


def held(rows: _Rows) -> _Rows | DenseRows:
    """The same law, held in the cheaper way: what is one tile is formed at once.

    Of a large vocabulary, and of packed rows, no more is formed than is read.
    """
    if not isinstance(rows, LogitRows) or is_wide(rows) or rows.logits_BLV.numel() > _TILE:
        return rows
    return DenseRows(rows.dense())


def as_rows(law: Rows | Tensor) -> Rows:
    """Rows of a law, however it is held."""
    return law if isinstance(law, Rows) else DenseRows(law)


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
    return logits_BLV.to(torch.float64, copy=True).div_(_floored(temperature_B)[:, None, None])


def _floored(temperature_B: Tensor) -> Tensor:
    return temperature_B.double().clamp(min=_COLDEST)
