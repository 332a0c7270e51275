"""What one forward sees of a cache in pages.

A device kernel reads `table_BT` and `lengths_B`; `update` is the definition, by gathering.

Shapes: P pages, B slots of one window, T pages of the longest table, H key-value heads, R new rows, S = T *
page_size keys, D head width; of a packed window N rows.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from blockroll.policies.base import StateWindow
from blockroll.policies.packing import Packing
from blockroll.rollout.engine.cache.contract import ROW_STEP
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
        self._is_empty: Tensor | None = None
        self.extent = table_BT.shape[1] * size
        heads_H1 = torch.arange(memory.num_heads, device=table_BT.device)[:, None]
        self._read_N = (table_BT[:, None] * memory.num_heads + heads_H1).flatten()
        if packing is not None:
            picked = packing.request_N, packing.offset_N
        if picked is not None:
            request_N, row_N = picked
            index_N = lengths_B[request_N] + row_N
            self._pages, self._rows = table_BT[request_N, index_N // size], index_N % size
            return
        index_BR = lengths_B[:, None] + torch.arange(num_rows, device=table_BT.device)
        self._pages, self._rows = table_BT.gather(1, index_BR // size), index_BR % size
        if has_empty:
            self._is_empty = (self._pages == 0)[..., None, None]

    @classmethod
    def of(
        cls,
        memory: PageMemory,
        tables: Sequence[Sequence[int]],
        lengths: Sequence[int],
        num_rows: Sequence[int],
        packing: Packing | None = None,
    ) -> Self:
        """For requests with these pages, so many rows there, and so many new ones behind them.

        Rows before a text, of a length below 0, are nobody's.
        """
        device, size = memory.device, memory.page_size
        needed, step = max(map(sum, zip(lengths, num_rows, strict=True))), max(ROW_STEP, size)
        width = -(-needed // step) * step // size
        rows = [[*table[:width], *[0] * (width - len(table))] for table in tables]
        picked = None
        if packing is None and min(lengths) < 0:
            places = [
                (request, row)
                for request, (length, count) in enumerate(zip(lengths, num_rows, strict=True))
                for row in range(max(-length, 0), count)
            ]
            request_N, row_N = torch.tensor(places, device=device).T
            picked = request_N, row_N
        return cls(
            memory,
            torch.tensor(rows, device=device),
            torch.tensor(lengths, device=device),
            num_rows[0],
            packing=packing,
            picked=picked,
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write one layer's new rows (B, H, R, D) to their pages; return its keys and values (B, H, S, D).

        A packed window takes packed rows (1, H, N, D), and of a rectangle the rows that are a request's.
        """
        keys, values = self.memory.layer(layer_idx)
        return self._updated(keys, key_states), self._updated(values, value_states)

    def _updated(self, held: Tensor, states: Tensor) -> Tensor:
        rows = states.transpose(1, 2)
        if self.packing is not None:
            rows = (rows if len(rows) == 1 else self.packing.pack(rows))[0]
        elif self.picked is not None:
            rows = rows[self.picked]
        if self._is_empty is not None:
            rows = rows.masked_fill(self._is_empty, 0)
        # Under autocast some norms give float32; attention would round it likewise.
        held.transpose(1, 2)[self._pages, self._rows] = rows.to(held.dtype)
        _, heads, size, width = held.shape
        read = held.view(-1, size * width).index_select(0, self._read_N)
        return read.view(len(self.table_BT), heads, self.extent, width)
