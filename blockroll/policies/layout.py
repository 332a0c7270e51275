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
    sees: Tensor  # int64 (R,), the last new row that each may attend; or bool (R, R), True where it may
    num_clean: int  # rows that hold tokens; those behind them are masks

    def positions(self, lengths_B: Tensor) -> Tensor:
        """Absolute positions, int64 (B, R), behind prefixes of these lengths; 0 before the first token."""
        return (lengths_B[:, None] + self.offsets_R).clamp(min=0)

    def attention_mask(self, lengths_B: Tensor, extent: int, *, sliding_window: int | None = None) -> Tensor:
        """Bool (B, 1, R, S), True where a row may attend, over `extent` keys in the order of the cache.

        A key below a request's length is its prefix; those from there on are the new rows in order. With a
        sliding window a row sees only keys less than that many positions back. Every row sees some key: an
        empty one would be NaN, and its values reach all others as 0 * NaN.
        """
        keys_S = torch.arange(extent, device=lengths_B.device)
        if self.sees.dim() == 1:
            mask_BRS = (lengths_B[:, None] + self.sees).clamp(min=0)[..., None] >= keys_S
        else:
            # A column before for the prefix, seen by all, and those behind for stale keys, seen by none.
            shown_RS = pad(pad(self.sees, (1, 0), value=True), (0, extent))
            place_BS = (keys_S - (lengths_B[:, None] - 1)).clamp(min=0)
            mask_BRS = shown_RS.expand(len(lengths_B), -1, -1).gather(
                2, place_BS[:, None].expand(-1, len(shown_RS), -1)
            )
        if sliding_window is not None:
            position_BS = keys_S.expand(len(lengths_B), -1)
            if self.sees.dim() > 1:
                new_BS = keys_S - lengths_B[:, None]  # which new row a key belongs to; negative in the prefix
                offset_BS = self.offsets_R[new_BS.clamp(0, len(self.offsets_R) - 1)]
                position_BS = torch.where(new_BS < 0, keys_S, lengths_B[:, None] + offset_BS)
            distance_BRS = self.positions(lengths_B)[..., None] - position_BS[:, None]
            mask_BRS = mask_BRS & (distance_BRS < sliding_window)
        return mask_BRS[:, None].contiguous()


def causal_rows(num_rows: int, device: torch.device) -> RowLayout:
    """Tokens one after another, each seeing those before it."""
    return two_forward_rows(num_rows, 0, device)


@lru_cache(maxsize=64)
def two_forward_rows(num_clean: int, num_drafts: int, device: torch.device) -> RowLayout:
    """Tokens, the last of which is the anchor, and K masks behind them; no token sees a mask.

    The masks see the tokens and each other.
    """
    offsets_R = torch.arange(num_clean + num_drafts, device=device)
    last_R = offsets_R.clone()
    last_R[num_clean:] = num_clean + num_drafts - 1
    return RowLayout(offsets_R=offsets_R, sees=last_R, num_clean=num_clean)


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
    return RowLayout(offsets_R=torch.cat(offsets), sees=sees_RR, num_clean=width)
