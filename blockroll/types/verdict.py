"""Drafts, and what verifying them decides.

Shapes: B requests, K drafted tokens, L = K + 1 target positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Final

from blockroll.errors import InvalidInput
from blockroll.types.rows import Rows

if TYPE_CHECKING:
    from torch import Tensor


class RowFault(IntEnum):
    """What is wrong with a row that holds no law. Kernels that find it take the even law instead."""

    NONE = 0
    NOT_FINITE = 1  # NaN, or infinity above 0
    EMPTY = 2  # no token has any probability


class PointMass(Enum):
    """Stands where a dense law would: each draft is the one token its law could give."""

    POINT_MASS = "point mass"


POINT_MASS: Final = PointMass.POINT_MASS


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """Proposed tokens and the law they were really drawn from.

    Raises InvalidInput without a law: tokens that were drawn from one are no point masses, so those are said.
    """

    token_ids_BK: "Tensor"  # int64; behind a request's number of drafts they hold no meaning
    law: "Rows | Tensor | PointMass"  # (B, K, V); as a tensor float64 probabilities; POINT_MASS: all certain
    num_drafts_B: "Tensor"  # int64, 0..K: how many drafts each request really has
    certain_B: "Tensor | None" = None  # bool: whose drafts were certain under a law of rows; None: nobody's
    num_drafts: Sequence[int] | None = None  # num_drafts_B, where the host knows it without a look
    faults_BK: "Tensor | None" = None  # int32, `RowFault` of the rows they came from; None: nobody looked

    def __post_init__(self) -> None:
        if self.law is None:
            raise InvalidInput(
                "drafts need the law they were drawn from, rows or probabilities (B, K, V), or POINT_MASS "
                "where each was certain, as argmax drafts and looked-up tokens are"
            )

    @property
    def is_certain(self) -> "Tensor | bool":
        """Whose drafts are point masses, bool (B,); True or False where it is the same of all."""
        if isinstance(self.law, PointMass):
            return True
        return False if self.certain_B is None else self.certain_B

    def behind_first(self) -> "Draft":
        """The drafts without those of the first position."""
        law = self.law
        if isinstance(law, Rows):
            law = law.behind_first()
        elif not isinstance(law, PointMass):
            law = law[:, 1:]
        return Draft(
            token_ids_BK=self.token_ids_BK[:, 1:],
            law=law,
            num_drafts_B=self.num_drafts_B - 1,
            certain_B=self.certain_B,
            faults_BK=None if self.faults_BK is None else self.faults_BK[:, 1:],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a verification was decided by, float64; the audit keeps it.

    By position every committed token was drawn, accepted drafts too, and no accept coin decided anything.
    Otherwise one token was drawn, behind the accepted drafts: what is said of draws holds there alone.
    """

    by_position_B: "Tensor"  # bool: whose tokens were drawn by the coins of their positions
    draft_probs_BK: "Tensor"  # of each drafted token under its own law,
    target_probs_BK: "Tensor"  # and under the law to commit by, as far as the drafts before it were accepted
    coins_BK: "Tensor"  # of acceptance
    uniforms_BL: "Tensor"  # that drew the token
    mass_BL: "Tensor"  # of what it was drawn from, a target row or a residual: all of it,
    low_BL: "Tensor"  # that of all ids before the token,
    high_BL: "Tensor"  # and the token's own with them


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one step commits: the first `num_committed` tokens of each row."""

    token_ids_BL: "Tensor"  # int64; positions behind num_committed hold no meaning
    num_committed_B: "Tensor"  # int64, 1..K + 1
    is_draft_BL: "Tensor"  # bool: the token is an accepted draft; the others were drawn from the target
    behavior_logprobs_BL: "Tensor"  # float64, log of the law each token was drawn from
    evidence: "Evidence | None" = None  # of one verification; None where two were joined
    faults_BL: "Tensor | None" = None  # int32, `RowFault` of target rows; None: nobody looked

    @property
    def num_accepted_B(self) -> "Tensor":
        """Accepted drafts, int64, 0..K."""
        return self.is_draft_BL.sum(dim=1)
