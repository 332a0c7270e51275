"""Rows of which each request has its own number, those of each behind those of the one before.

What works row by row runs on the N rows that there are. Attention runs on rectangles, for each request has
keys of its own: a first *band* of rows for all requests, as many as most of them have, and behind it bands of
the further rows of those that have more. A request with many rows then widens nothing for the others.

Shapes: B requests, L rows of the request that has most, N rows in all, C cells of all bands, S keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blockroll.kernels.transfer import send

# In rows of attention, of one request: what its keys and values cost to read, and what another call costs.
_KEYS_COST = 4
_BAND_COST = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Rows first..first + width - 1 of some requests."""

    first: int
    width: int
    requests_B: Tensor | None  # int64, those with more than `first` rows; None: all
    size: int  # requests

    def of(self, tensor: Tensor) -> Tensor:
        """What belongs to its requests."""
        return tensor if self.requests_B is None else tensor.index_select(0, self.requests_B)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Made once for a forward."""

    num_rows: tuple[int, ...]  # of each request, at least 1
    num_rows_B: Tensor  # int64, the same
    width: int  # L, or more
    starts_B: Tensor  # int64, first row of each request
    request_N: Tensor  # int64, whose each row is,
    offset_N: Tensor  # and which of its rows
    bands: tuple[Band, ...]
    row_C: Tensor  # int64, the row in each cell of the bands; where a request has none, its last
    cell_N: Tensor  # int64, the cell of each row

    @classmethod
    def of(cls, num_rows: Sequence[int], width: int, device: torch.device) -> "Packing":
        """For requests with so many rows, none with more than `width`: counted here, and sent at once."""
        counts_B = np.array(num_rows, dtype=np.int64)
        starts_B = counts_B.cumsum() - counts_B
        request_N = np.arange(len(counts_B)).repeat(counts_B)
        offset_N = np.arange(len(request_N)) - starts_B[request_N]
        spans = _spans(num_rows)
        members = [np.flatnonzero(counts_B > first) for first, _ in spans]
        rows, cell_N, num_cells = [], np.empty_like(request_N), 0
        for (first, stop), requests_b in zip(spans, members, strict=True):
            counts_b1, offsets_l = counts_B[requests_b, None], np.arange(first, stop)
            row_bl = starts_B[requests_b, None] + np.minimum(offsets_l, counts_b1 - 1)
            cells = np.flatnonzero(offsets_l < counts_b1)
            cell_N[row_bl.ravel()[cells]] = cells + num_cells
            rows.append(row_bl.ravel())
            num_cells += row_bl.size
        sent = send([counts_B, starts_B, request_N, offset_N, np.concatenate(rows), cell_N, *members], device)
        bands = tuple(
            Band(
                first=first,
                width=stop - first,
                requests_B=requests_B if first else None,
                size=len(requests_B),
            )
            for (first, stop), requests_B in zip(spans, sent[6:], strict=True)
        )
        return cls(
            num_rows=tuple(num_rows),
            num_rows_B=sent[0],
            width=width,
            starts_B=sent[1],
            request_N=sent[2],
            offset_N=sent[3],
            bands=bands,
            row_C=sent[4],
            cell_N=sent[5],
        )

    def pack(self, rectangle: Tensor) -> Tensor:
        """(B, L, ...) to (1, N, ...)."""
        return rectangle[self.request_N, self.offset_N][None]

    def by_band(self, rows: Tensor) -> list[Tensor]:
        """(1, N, ...) to rectangles (size, width, ...) of the bands."""
        cells = rows[0].index_select(0, self.row_C)
        parts = torch.split(cells, [band.size * band.width for band in self.bands])
        return [
            part.view(band.size, band.width, *part.shape[1:])
            for part, band in zip(parts, self.bands, strict=True)
        ]

    def from_bands(self, rectangles: Sequence[Tensor]) -> Tensor:
        """Back to (1, N, ...)."""
        parts = [each.flatten(0, 1) for each in rectangles]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).index_select(0, self.cell_N)[None]


def _spans(num_rows: Sequence[int]) -> list[tuple[int, int]]:
    """First row and row behind the last of each band, as they cost least."""
    edges = [0, *sorted(set(num_rows))]
    sizes = [sum(count > edge for count in num_rows) for edge in edges]
    costs, following = [0] * len(edges), [len(edges)] * len(edges)
    for start in range(len(edges) - 2, -1, -1):
        costs[start], following[start] = min(
            (sizes[start] * (_KEYS_COST + edges[stop] - edges[start]) + _BAND_COST + costs[stop], stop)
            for stop in range(start + 1, len(edges))
        )
    spans, start = [], 0
    while start < len(edges) - 1:
        spans.append((edges[start], edges[following[start]]))
        start = following[start]
    return spans
