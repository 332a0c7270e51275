"""What one forward sees of a cache in pages.

A device kernel reads `table_BT` and `lengths_B`; `update` is the definition, by gathering.

Shapes: P pages, B slots of one window, T pages of the longest table, H key-value heads, R new rows, S = T *
page_size keys, D head width; of a packed window N rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from blockroll.policies.packing import Packing
from blockroll.rollout.engine.cache.contract import ROW_STEP
from blockroll.rollout.engine.cache.page_memory import PageMemory


class PagedWindow:
    """What one forward sees of the cache; stands in for transformers' cache object."""

    def __init__(
        self,
        memory: PageMemory,
        tables: Sequence[Sequence[int]],
        lengths: Sequence[int],
        num_rows: Sequence[int],
        packing: Packing | None = None,
    ) -> None:
        """For requests with these pages, so many rows there, and so many new ones behind them."""
        device, size, self.packing, self._memory = memory.device, memory.page_size, packing, memory
        needed, step = max(map(sum, zip(lengths, num_rows, strict=True))), max(ROW_STEP, size)
        self.extent = -(-needed // step) * step
        self.lengths_B = torch.tensor(lengths, device=device)
        width = self.extent // size
        rows = [[*table[:width], *[0] * (width - len(table))] for table in tables]
        self.table_BT = torch.tensor(rows, device=device)  # int64; page 0 where a request has fewer
        heads_H1 = torch.arange(memory.num_heads, device=device)[:, None]
        self._read_N = (self.table_BT[:, None] * memory.num_heads + heads_H1).flatten()
        # Rows of requests that are written, where these are not all of a rectangle.
        self._picked: tuple[Tensor, Tensor] | None = None
        if packing is not None:
            request_N, index_N = packing.request_N, self.lengths_B[packing.request_N] + packing.offset_N
            self._pages, self._rows = self.table_BT[request_N, index_N // size], index_N % size
            return
        index_BR = self.lengths_B[:, None] + torch.arange(num_rows[0], device=device)
        if min(lengths) < 0:  # rows before a text are nobody's
            request_N, row_N = (index_BR >= 0).nonzero(as_tuple=True)
            self._picked = request_N, row_N
            index_N = index_BR[self._picked]
            self._pages, self._rows = self.table_BT[request_N, index_N // size], index_N % size
            return
        self._pages, self._rows = self.table_BT.gather(1, index_BR // size), index_BR % size

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write one layer's new rows (B, H, R, D) to their pages; return its keys and values (B, H, S, D).

        A packed window takes packed rows (1, H, N, D), and of a rectangle the rows that are a request's.
        """
        keys, values = self._memory.layer(layer_idx)
        return self._updated(keys, key_states), self._updated(values, value_states)

    def _updated(self, held: Tensor, states: Tensor) -> Tensor:
        rows = states.transpose(1, 2)
        if self.packing is not None:
            rows = (rows if len(rows) == 1 else self.packing.pack(rows))[0]
        elif self._picked is not None:
            rows = rows[self._picked]
        # Under autocast some norms give float32; attention would round it likewise.
        held.transpose(1, 2)[self._pages, self._rows] = rows.to(held.dtype)
        _, heads, size, width = held.shape
        read = held.view(-1, size * width).index_select(0, self._read_N)
        return read.view(len(self.table_BT), heads, self.extent, width)
