"""The new rows of one forward, described by a few integers: where each stands, and what each sees.

Shapes: B requests, R new rows per request, S keys.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from blockroll.errors import InvalidInput
from blockroll.kernels.transfer import sent


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLayout:
    """Rows behind a cached prefix, alike for every request: clean rows, one text, and then blocks of masks.

    All rows see the whole prefix. A clean row sees the clean ones up to itself. A block of level p sees the
    first p + 1 clean rows and itself, in both directions, and stands on the positions behind them.
    """

    num_clean: int  # rows that hold tokens
    width: int = 0  # masks of one block
    levels: tuple[int, ...] = ()  # of each block; -1: it sees no clean row

    def __post_init__(self) -> None:
        has_blocks = self.width > 0 and len(self.levels) > 0
        if self.num_clean < 0 or (self.width > 0) != (len(self.levels) > 0):
            raise InvalidInput(
                f"{self.num_clean} clean rows and blocks of {self.width} masks at levels {self.levels}: give "
                "a number of rows from 0 on, and a width with levels or neither"
            )
        if has_blocks and not all(-1 <= level < self.num_clean for level in self.levels):
            raise InvalidInput(
                f"levels are {self.levels} behind {self.num_clean} clean rows: a level is the last clean row "
                f"that a block sees, -1 to {self.num_clean - 1}"
            )

    @property
    def num_masks(self) -> int:
        return self.width * len(self.levels)

    @property
    def num_rows(self) -> int:
        """R."""
        return self.num_clean + self.num_masks

    def offsets(self, device: torch.device) -> Tensor:
        """The position of each row, int64 (R,), counted from the end of the cached prefix; made once."""
        return _offsets(self, device)

    def positions(self, lengths_B: Tensor) -> Tensor:
        """Absolute positions, int64 (B, R), behind prefixes of these lengths; 0 before the first token."""
        return (lengths_B[:, None] + _offsets(self, lengths_B.device)).clamp(min=0)

    def mask(self, lengths_B: Tensor, extent: int, *, sliding_window: int | None = None) -> Tensor:
        """Bool (B, 1, R, S), True where a row may attend, over `extent` keys in the order of the cache.

        A key below a request's length is its prefix; those from there on are the new rows in order. With a
        sliding window a row sees only keys less than that many positions back. Every row sees some key: an
        empty one would be NaN, and its values reach all others as 0 * NaN. Texts that begin later have no
        blocks apart from the clean rows.
        """
        device, lengths_B1, num_rows = lengths_B.device, lengths_B[:, None], self.num_rows
        keys_S, last_R = _counted(0, extent, device), _last(self, device)
        if last_R is not None:
            last_BR = (lengths_B1 + last_R).clamp(min=0)  # a row before its text's first token sees that
            mask_BRS = keys_S <= last_BR[..., None]
            if sliding_window is not None:
                mask_BRS &= keys_S > (self.positions(lengths_B) - sliding_window)[..., None]
            return mask_BRS[:, None]
        # New rows for which a packed window has no room are in columns behind it.
        columns = extent + num_rows
        mask_BRS = torch.empty((len(lengths_B), num_rows, columns), dtype=torch.bool, device=device)
        prefix_BRS = mask_BRS[..., :extent]
        prefix_BRS.copy_((keys_S < lengths_B1)[:, None])
        if sliding_window is not None:
            prefix_BRS &= keys_S > (self.positions(lengths_B) - sliding_window)[..., None]
        column_BR = lengths_B1 + _counted(0, num_rows, device)
        shown_BRR = _shown(self, sliding_window, device).expand(len(lengths_B), -1, -1)
        mask_BRS.scatter_(2, column_BR[:, None].expand(shown_BRR.shape), shown_BRR)
        return prefix_BRS[:, None].contiguous()


@lru_cache(maxsize=64)
def _counted(start: int, stop: int, device: torch.device) -> Tensor:
    return torch.arange(start, stop, device=device)


@lru_cache(maxsize=256)
def _last(layout: RowLayout, device: torch.device) -> Tensor | None:
    """The last new row that each sees, int64 (R,); None where one does not see all rows before that."""
    clean = layout.num_clean
    if layout.levels not in ((), (clean - 1,)):
        return None
    return sent([*range(clean), *[layout.num_rows - 1] * layout.width], device)


@lru_cache(maxsize=256)
def _offsets(layout: RowLayout, device: torch.device) -> Tensor:
    slots = range(1, layout.width + 1)
    offsets = [*range(layout.num_clean), *(level + slot for level in layout.levels for slot in slots)]
    return sent(offsets, device)


@lru_cache(maxsize=256)
def _shown(layout: RowLayout, sliding_window: int | None, device: torch.device) -> Tensor:
    """Which new rows each new row sees, bool (R, R)."""
    num_rows, clean = layout.num_rows, layout.num_clean
    shown_RR = torch.zeros((num_rows, num_rows), dtype=torch.bool)
    shown_RR[:clean, :clean] = torch.ones_like(shown_RR[:clean, :clean]).tril()
    for block, level in enumerate(layout.levels):
        own = slice(clean + block * layout.width, clean + (block + 1) * layout.width)
        shown_RR[own, : level + 1] = True
        shown_RR[own, own] = True
    if sliding_window is not None:
        offset_R = _offsets(layout, torch.device("cpu"))
        shown_RR &= offset_R[:, None] - offset_R < sliding_window
    return shown_RR.to(device)
