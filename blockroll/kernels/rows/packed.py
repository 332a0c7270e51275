"""Rows of which each request has its own number, without the cells that would make them a rectangle.

The rows of each request stand behind those of the one before. Where a rectangle is asked for, a request's
last row stands again in the cells that it lacks, so every cell holds a law; none of them decides anything.

Shapes: B requests, N rows in all, L rows of the request that has most, M of these from the first on,
V vocabulary.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from blockroll.kernels import transfer
from blockroll.kernels.rows.compiled import At, RowTable
from blockroll.kernels.rows.edits import Edits
from blockroll.kernels.rows.logit_rows import LogitRows, Weighed, table_of
from blockroll.kernels.rows.truncation import Cut
from blockroll.kernels.rows.weights import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLogits:
    """Logits of a forward that computed these rows alone."""

    logits_NV: Tensor  # float32
    starts_B: Tensor  # int64, where the rows of each request begin,
    num_rows_B: Tensor  # int64, and how many they are
    width: int  # L

    @property
    def shape(self) -> torch.Size:
        """(B, L, V), of the rectangle."""
        return torch.Size((len(self.starts_B), self.width, self.logits_NV.shape[-1]))

    @property
    def row_BL(self) -> Tensor:
        """Which of the N rows stands in each cell, int64."""
        offsets_L = torch.arange(self.width, device=self.starts_B.device)
        return self.starts_B[:, None] + torch.minimum(offsets_L, self.num_rows_B[:, None] - 1)

    def has_row(self, num_rows: int) -> Tensor:
        """Which of the first cells of each request are its own, bool (B, M)."""
        return torch.arange(num_rows, device=self.starts_B.device) < self.num_rows_B[:, None]

    def padded(self) -> Tensor:
        """The rectangle (B, L, V): where rows are edited one request at a time."""
        return self.logits_NV[self.row_BL]

    def without_non_finite(self) -> tuple[Self, Tensor | None]:
        """Rows that hold NaN or infinity are zeros then; and which requests had some (None if none did)."""
        if are_finite(self.logits_NV):
            return self, None
        is_bad_N = ~torch.isfinite(self.logits_NV).all(dim=-1)
        logits_NV = torch.where(is_bad_N[:, None], 0.0, self.logits_NV)
        return replace(self, logits_NV=logits_NV), is_bad_N[self.row_BL].any(dim=1)


Logits = Tensor | PackedLogits  # (B, L, V)


def cells(of_BN: Tensor) -> At:
    """All places of such a rectangle, one request after another."""
    requests_B1 = torch.arange(len(of_BN), device=of_BN.device)[:, None]
    offsets_N = torch.arange(of_BN.shape[1], device=of_BN.device)
    return At(*(each.expand(of_BN.shape).flatten() for each in (requests_B1, offsets_N)))


def are_finite(logits: Tensor) -> bool:
    """Whether a look has shown that all of them are; False where a look would be a wait."""
    # A sum is not finite if any entry is not: one pass clears them all.
    return transfer.is_free(logits.device) and math.isfinite(logits.sum().item())


def without_non_finite(logits_BLV: Logits) -> tuple[Logits, Tensor | None]:
    """Logits fit for the sampler, and which requests held NaN or infinity (None if none did)."""
    if isinstance(logits_BLV, PackedLogits):
        return logits_BLV.without_non_finite()
    if are_finite(logits_BLV):
        return logits_BLV, None
    is_bad_B = ~torch.isfinite(logits_BLV).all(dim=(1, 2))
    return torch.where(is_bad_B[:, None, None], 0.0, logits_BLV), is_bad_B


def rectangle(logits_BLV: Logits) -> Tensor:
    """All cells (B, L, V)."""
    return logits_BLV.padded() if isinstance(logits_BLV, PackedLogits) else logits_BLV


@dataclass(frozen=True, slots=True)
class PackedRows(Weighed):
    """softmax(logits / temperature) of packed rows, a point mass at temperature 0; edited and cut."""

    packed: PackedLogits
    temperature_B: Tensor
    has_greedy: bool  # whether any temperature is 0
    cut: Cut | None = None  # None: no request is truncated,
    edits: Edits | None = None  # or has any logit of its own

    @property
    def shape(self) -> torch.Size:
        return self.packed.shape

    def probs_of(self, token_ids_BN: Tensor) -> Tensor:
        """As of other rows; 0 in cells that are no request's."""
        at = cells(token_ids_BN)
        index_R = self.packed.row_BL[:, : token_ids_BN.shape[1]].flatten()
        probs_R1 = self._rows(index_R, *at).probs_of(token_ids_BN.reshape(-1, 1))
        return torch.where(self.packed.has_row(token_ids_BN.shape[1]), probs_R1.view(token_ids_BN.shape), 0.0)

    def logprobs_at(self, at: At, token_ids_N: Tensor) -> Tensor:
        """Natural logarithms of the probability of a token of each of these rows: float64 (N,).

        Also where it is too small for float64; no temperature is 0.
        """
        table = self.table()
        if table is not None:
            return table.looked(at, 0, asked_NA=token_ids_N[:, None], logs=True).asked_NA[:, 0]
        rows = self._rows(self.packed.row_BL[at], *at)
        return rows.logprobs_of(token_ids_N[:, None])[:, 0]

    def at(self, requests_N: Tensor, offsets_N: Tensor) -> Tensor:
        return self.weights_at(requests_N, offsets_N).dense(self.shape[-1])

    def weights_at(self, requests_N: Tensor, offsets_N: Tensor) -> Weights:
        """Of these rows, each of a request and at an offset."""
        packed = self.packed
        offsets_N = torch.minimum(offsets_N, packed.num_rows_B[requests_N] - 1)
        rows = self._rows(packed.starts_B[requests_N] + offsets_N, requests_N, offsets_N)
        return rows.weights_at(
            torch.arange(len(requests_N), device=offsets_N.device), torch.zeros_like(offsets_N)
        )

    def table(self) -> RowTable | None:
        """The same for compiled code; None where it does not serve."""
        packed = self.packed
        return table_of(
            packed.logits_NV,
            self.temperature_B,
            self.cut,
            packed=(packed.starts_B, packed.num_rows_B),
            edits=self.edits,
        )

    def behind_first(self) -> Self:
        packed = self.packed
        return replace(
            self,
            packed=replace(
                packed,
                starts_B=packed.starts_B + 1,
                num_rows_B=packed.num_rows_B - 1,
                width=packed.width - 1,
            ),
            edits=None if self.edits is None else self.edits.of(slice(None), slice(1, None)),
        )

    def logits_of(self, ids_BU: Tensor) -> Tensor:
        """Logits of some tokens in each row: float64 (B, M, U)."""
        return self.packed.logits_NV[self.packed.row_BL[..., None], ids_BU[:, None]].double()

    def padded(self) -> LogitRows:
        """The same laws in the cells of a rectangle."""
        rows = LogitRows(self.packed.padded(), self.temperature_B, self.has_greedy, self.cut)
        return replace(rows, edits=self.edits)

    def dense(self) -> Tensor:
        return self.padded().dense()

    def _rows(self, index_R: Tensor, request_R: Tensor, offset_R: Tensor) -> LogitRows:
        """Some of the N rows, each as the only row of a request."""
        cut, edits = None if self.cut is None else self.cut.of(request_R), None
        if self.edits is not None:
            edits = Edits(self.edits.ids_BU[request_R], self.edits.logits_BLU[request_R, offset_R][:, None])
        return LogitRows(
            self.packed.logits_NV.index_select(0, index_R)[:, None],
            self.temperature_B[request_R],
            self.has_greedy,
            cut,
            edits=edits,
        )
