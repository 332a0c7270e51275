"""What stands in rows of logits instead of the policy's own, held as what it comes from.

Shapes: B requests, L rows, K drafted tokens, N rows, U edited tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from blockroll.samplers.processing import mixed_logits


@dataclass(frozen=True, slots=True)
class Mix:
    """Draft rows of which a part enters the rows they were met by, as `mixed_logits` has it."""

    draft_logits_BKV: Tensor
    weight_B: Tensor
    num_drafts_B: Tensor

    def of_all(self, logits_BLV: Tensor) -> Tensor:
        """All rows, mixed: float64."""
        return mixed_logits(logits_BLV, self.draft_logits_BKV, self.weight_B, self.num_drafts_B)

    def tile(self, place: tuple[slice, slice], logits_BLV: Tensor) -> Tensor:
        """These rows of these requests."""
        requests, rows = place
        num_drafts_B = self.num_drafts_B[requests] - rows.start
        return mixed_logits(logits_BLV, self.draft_logits_BKV[place], self.weight_B[requests], num_drafts_B)

    def at(self, requests_N: Tensor, offsets_N: Tensor, logits_N1V: Tensor) -> Tensor:
        """These rows, each of a request and at an offset."""
        met_N = offsets_N < self.num_drafts_B[requests_N]
        place_N = offsets_N.clamp(max=self.draft_logits_BKV.shape[1] - 1)
        draft_N1V = self.draft_logits_BKV[requests_N, place_N][:, None]
        return mixed_logits(logits_N1V, draft_N1V, self.weight_B[requests_N], met_N.long())

    def behind_first(self) -> "Mix | None":
        """That of all rows but the first of each request; None: nothing is left to mix."""
        if self.draft_logits_BKV.shape[1] < 2:
            return None
        return Mix(self.draft_logits_BKV[:, 1:], self.weight_B, self.num_drafts_B - 1)


class Edits(NamedTuple):
    """Few tokens of each row, and the logits that stand there instead of its own."""

    ids_BU: Tensor  # int64; an id that stands twice has the same logit twice
    logits_BLU: Tensor  # float64

    def of(self, requests: slice | Tensor, offsets: slice | Tensor) -> "Edits":
        """Those of some rows."""
        return Edits(self.ids_BU[requests], self.logits_BLU[requests][:, offsets])

    def put(self, logits_BLV: Tensor) -> Tensor:
        """A copy of these rows with them in it, float64."""
        ids_BLU = self.ids_BU[:, None].expand(self.logits_BLU.shape)
        return logits_BLV.to(torch.float64, copy=True).scatter_(-1, ids_BLU, self.logits_BLU)
