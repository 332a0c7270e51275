"""Whether requests with different numbers of drafts are verified packed, or padded to the longest.

Packed, linear layers, norms and output head run on the N rows that there are instead of B x L, and attention
on fewer; the price is some copies in every layer, which a policy knows in rows (`least_saved_rows`).
"""

import math

from blockroll.kernels import transfer
from blockroll.kernels.block_attention import Packing
from blockroll.policies.base import Policy
from blockroll.types import Draft


def least_saved(policy: Policy) -> float:
    """Rows that packing must leave out of a forward to be the cheaper way; infinite if a policy cannot."""
    # Asked in every step: a check against the protocol would take longer than all else that is asked there.
    saved: float = getattr(policy, "least_saved_rows", math.inf)
    return saved


def packing_of(draft: Draft, width: int, policy: Policy) -> Packing | None:
    """The packing of anchors and their drafts, in L = `width` cells; None: padded.

    Counts that only a device knows are not waited for.
    """
    num_drafts = draft.num_drafts
    if num_drafts is None:
        if not transfer.is_free(policy.device):
            return None
        num_drafts = draft.num_drafts_B.tolist()
    num_rows = [count + 1 for count in num_drafts]
    if len(num_rows) * width - sum(num_rows) < least_saved(policy):
        return None
    return Packing.of(num_rows, width, policy.device)
