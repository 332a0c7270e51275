"""What one forward sees of a cache in pages.

Kernels read the pages themselves. On a CPU `update` hands out all keys and values, gathered.

Shapes: P pages, B slots of one window, T pages of the longest table, H key-value heads, R new rows, S = T *
page_size keys, D head width; of a packed window N rows.
"""

from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from blockroll.kernels import choice
from blockroll.kernels.block_attention import Packing
from blockroll.kernels.cache_write import cache_write, places_of
from blockroll.kernels.pages import Pages
from blockroll.kernels.transfer import send, sent
from blockroll.policies.base import StateWindow
from blockroll.rollout.engine.cache.contract import ROW_STEP, Ahead
from blockroll.rollout.engine.cache.page_memory import PageMemory


class PagedWindow:
    """What one forward sees of the cache; stands in for transformers' cache object.

    Made from tensors alone, it reads nothing on the host: a graph of the forward can hold its making.
    """

    states: StateWindow | None = None

    def __init__(
        self,
        memory: PageMemory,
        table_BT: Tensor,
        lengths_B: Tensor,
        num_rows: int,
        *,
        packing: Packing | None = None,
        picked: tuple[Tensor, Tensor] | None = None,
        has_empty: bool = False,
    ) -> None:
        """`num_rows` new rows each, behind those at `lengths_B`, in the pages of a table that holds both.

        `picked` names requests and rows (N,) that are written, where these are not all of a rectangle. Where
        the table `has_empty` requests, of page 0 alone, nothing but zeros is written there.
        """
        self.memory, size = memory, memory.page_size
        self.table_BT, self.lengths_B = table_BT, lengths_B  # int64; page 0 where a request has fewer
        self.packing, self.picked = packing, picked
        self.extent = table_BT.shape[1] * size
        self.pages: Callable[[int], Pages] | None = self._pages if choice.is_triton() else None
        self._read_N: Tensor | None = None  # where all rows lie, once they are asked for
        self._written = picked if packing is None else (packing.request_N, packing.offset_N)
        if self._written is not None:
            request_N, row_N = self._written
            index_N = lengths_B[request_N] + row_N
            self._places = places_of(table_BT, size, index_N[None], request_BC=request_N[None])
            return
        index_BR = lengths_B[:, None] + torch.arange(num_rows, device=table_BT.device)
        self._places = places_of(table_BT, size, index_BR, has_gaps=has_empty)

    @classmethod
    def of(
        cls,
        memory: PageMemory,
        tables: Sequence[Sequence[int]],
        lengths: Sequence[int],
        num_rows: Sequence[int],
        packing: Packing | None = None,
        ahead: Ahead | None = None,
    ) -> Self:
        """For requests with these pages, so many rows there, and so many new ones behind them.

        Rows before a text, of a length below 0, are nobody's. Rows `ahead` stand before the new ones.
        """
        device, size = memory.device, memory.page_size
        needed, step = max(map(sum, zip(lengths, num_rows, strict=True))), max(ROW_STEP, size)
        needed += 0 if ahead is None else ahead.most
        width = -(-needed // step) * step // size
        rows = [[*table[:width], *[0] * (width - len(table))] for table in tables]
        picked = None
        if packing is None and min(lengths) < 0:
            places = [
                (request, row)
                for request, (length, count) in enumerate(zip(lengths, num_rows, strict=True))
                for row in range(max(-length, 0), count)
            ]
            request_N, row_N = sent(places, device).T
            picked = request_N, row_N
        table_BT, lengths_B = send([np.array(rows), np.array(lengths)], device)
        return cls(
            memory,
            table_BT,
            lengths_B if ahead is None else lengths_B + ahead.rows_B,
            num_rows[0],
            packing=packing,
            picked=picked,
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write one layer's new rows (B, H, R, D) to their pages; return its keys and values (B, H, S, D).

        Where attention reads the pages itself, it returns the new rows, in the type of the pages.
        A packed window takes packed rows (1, H, N, D), and of a rectangle the rows that are a request's.
        """
        pages = self._pages(layer_idx)
        cache_write(self._rows(key_states), self._rows(value_states), pages, self._places)
        if self.pages is not None:
            return key_states.to(pages.keys_NGZD.dtype), value_states.to(pages.values_NGZD.dtype)
        return self._read(pages.keys_NGZD), self._read(pages.values_NGZD)

    def _pages(self, layer_idx: int) -> Pages:
        keys, values = self.memory.layer(layer_idx)
        return Pages(keys_NGZD=keys, values_NGZD=values, table_BT=self.table_BT)

    def _rows(self, states: Tensor) -> Tensor:
        """Those that are written, (1, H, N, D) where these are not all of a rectangle."""
        is_packed = self.packing is not None and len(states) == 1
        if self._written is None or is_packed:
            return states
        return states.transpose(1, 2)[self._written].transpose(0, 1)[None]

    def _read(self, held: Tensor) -> Tensor:
        """All rows of these requests, gathered."""
        _, heads, size, width = held.shape
        if self._read_N is None:
            heads_H1 = torch.arange(heads, device=held.device)[:, None]
            self._read_N = (self.table_BT[:, None] * heads + heads_H1).flatten()
        read = held.view(-1, size * width).index_select(0, self._read_N)
        return read.view(len(self.table_BT), heads, self.extent, width)
