"""The new rows of one forward: where each stands, what each sees, and which of them are masks.

Shapes: B requests, R new rows per request, S keys, K drafted tokens, P proposals.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLayout:
    """Rows behind a cached prefix, laid out alike for every request. All rows see the whole prefix."""

    offsets_R: Tensor  # int64, position of each row counted from the end of the cached prefix
    sees_RR: Tensor | None  # bool, True where a row may attend another new row; None: causal
    num_clean: int  # rows that hold tokens; those behind them are masks

    def positions(self, lengths_B: Tensor) -> Tensor:
        """Absolute positions, int64 (B, R), behind prefixes of these lengths."""
        return lengths_B[:, None] + self.offsets_R

    def attention_mask(self, lengths_B: Tensor, extent: int, *, sliding_window: int | None = None) -> Tensor:
        """Bool (B, 1, R, S), True where a row may attend, over `extent` keys in the order of the cache.

        A key below a request's length is its prefix; those from there on are the new rows in order. With a
        sliding window a row sees only keys less than that many positions back.
        """
        keys_S = torch.arange(extent, device=lengths_B.device)
        new_BS = keys_S - lengths_B[:, None]  # which new row a key belongs to; negative in the prefix
        num_rows = len(self.offsets_R)
        if self.sees_RR is None:
            rows_R = torch.arange(num_rows, device=lengths_B.device)
            mask_BRS = new_BS[:, None, :] <= rows_R[:, None]
        else:
            # One column before for the prefix, seen by all, and one behind for stale keys, seen by none.
            sees_RC = pad(self.sees_RR, (1, 1))
            sees_RC[:, 0] = True
            mask_BRS = sees_RC[:, (new_BS + 1).clamp(0, num_rows + 1)].transpose(0, 1)
        if sliding_window is not None:
            offset_BS = self.offsets_R[new_BS.clamp(0, num_rows - 1)]
            position_BS = torch.where(new_BS < 0, keys_S, lengths_B[:, None] + offset_BS)
            distance_BRS = self.positions(lengths_B)[..., None] - position_BS[:, None]
            mask_BRS = mask_BRS & (distance_BRS < sliding_window)
        return mask_BRS[:, None].contiguous()


def causal_rows(num_rows: int, device: torch.device) -> RowLayout:
    """Tokens one after another, each seeing those before it."""
    return RowLayout(offsets_R=torch.arange(num_rows, device=device), sees_RR=None, num_clean=num_rows)


@lru_cache(maxsize=64)
def two_forward_rows(num_drafts: int, device: torch.device) -> RowLayout:
    """The anchor, and K masks behind it that see it and each other; the anchor sees no mask."""
    sees_RR = torch.ones((num_drafts + 1, num_drafts + 1), dtype=torch.bool, device=device)
    sees_RR[0, 1:] = False
    return RowLayout(offsets_R=torch.arange(num_drafts + 1, device=device), sees_RR=sees_RR, num_clean=1)


@lru_cache(maxsize=64)
def fused_rows(num_drafts: int, levels: tuple[int, ...], device: torch.device) -> RowLayout:
    """The anchor and K drafts to verify, then a proposal of K + 1 masks per level.

    The proposal of level p sees the anchor, the first p drafts and itself. Its slot 0 stands on the position
    of the token that the verdict adds after p accepted drafts, so slots 1..K are the next step's drafts.
    Source: the layout that Zyphra ships for ZAYA1-8B-Diffusion; TiDAR (arXiv 2511.08923), figure 3.
    """
    width = num_drafts + 1
    num_rows = width * (len(levels) + 1)
    offsets = [torch.arange(width, device=device)]
    sees_RR = torch.zeros((num_rows, num_rows), dtype=torch.bool, device=device)
    sees_RR[:width, :width] = torch.ones_like(sees_RR[:width, :width]).tril()
    for index, level in enumerate(levels, start=1):
        rows = slice(index * width, (index + 1) * width)
        sees_RR[rows, : level + 1] = True
        sees_RR[rows, rows] = True
        offsets.append(torch.arange(width, device=device) + level + 1)
    return RowLayout(offsets_R=torch.cat(offsets), sees_RR=sees_RR, num_clean=width)
