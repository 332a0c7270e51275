"""A window that stands in for a cache, where a few forwards follow one another."""

import torch
from torch import Tensor


class GrowingWindow:
    """Texts from their first token on, for forwards one after another."""

    states = None
    pages = None

    def __init__(self, num_texts: int) -> None:
        self.lengths_B = torch.zeros(num_texts, dtype=torch.int64)
        self.extent = 0
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def grown(self, num_rows: int) -> "GrowingWindow":
        """The same, for so many rows more."""
        self.lengths_B = torch.full_like(self.lengths_B, self.extent)
        self.extent += num_rows
        return self

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append one layer's new rows (B, H, R, D); return all of its keys and values."""
        new = (key_states, value_states)
        if layer_idx in self._held:
            keys, values = self._held[layer_idx]
            new = torch.cat([keys, new[0]], dim=2), torch.cat([values, new[1]], dim=2)
        self._held[layer_idx] = new
        return new
