"""Whether requests with different numbers of drafts are verified packed, or padded to the longest.

Packed, the linear layers, norms and output head run on the N rows there are instead of B x L; attention runs
on a rectangle either way, and some copies to and from it in every layer are the price.
"""

from collections.abc import Sequence

from blockroll.policies.base import Policy, VerifiesPacked
from blockroll.policies.packing import Packing

LEAST_SAVED = 4  # rows


def packing_of(num_drafts: Sequence[int], width: int, policy: Policy) -> Packing | None:
    """The packing of anchors and so many drafts of each request, in L = `width` cells; None: padded."""
    num_rows = [count + 1 for count in num_drafts]
    num_saved = len(num_rows) * width - sum(num_rows)
    if num_saved < LEAST_SAVED or not isinstance(policy, VerifiesPacked):
        return None
    return Packing.of(num_rows, width, policy.device)
