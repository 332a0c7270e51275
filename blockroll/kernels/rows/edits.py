"""What stands in rows of logits instead of the policy's own, held as what it comes from.

Shapes: B requests, L rows, K drafted tokens, N rows, U edited tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


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


def mixed_logits(
    policy_logits_BLV: Tensor, draft_logits_BKV: Tensor, weight_B: Tensor, num_drafts_B: Tensor
) -> Tensor:
    """Target rows of the mixed law: float64 (B, L, V), w z_policy + (1 - w) z_draft where a draft was met.

    A draft row enters only at the position it was drafted for; rows without a draft, the extra row among
    them, stay causal, and so does every row of a request with w = 1, bit for bit. The law of a token then
    depends on its prefix and on the draft row it met, so its log-probability is known only here.
    Source: logit mixing of TiDAR (arXiv 2511.08923, ablation), as a target law under the verify rule.
    """
    num_drafts = draft_logits_BKV.shape[1]
    policy_BLV = policy_logits_BLV.to(torch.float64)
    weight_B11 = weight_B.to(torch.float64)[:, None, None]
    mixed_BKV = weight_B11 * policy_BLV[:, :num_drafts] + (1 - weight_B11) * draft_logits_BKV.to(
        torch.float64
    )
    offsets_K = torch.arange(num_drafts, device=policy_BLV.device)
    meets_draft_BK = (offsets_K < num_drafts_B[:, None]) & (weight_B < 1)[:, None]
    mixed_BKV = torch.where(meets_draft_BK[..., None], mixed_BKV, policy_BLV[:, :num_drafts])
    return torch.cat([mixed_BKV, policy_BLV[:, num_drafts:]], dim=1)
