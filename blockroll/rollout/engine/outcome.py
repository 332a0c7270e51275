"""What the host needs to know of a step: tokens, counts, log-probabilities and what went wrong.

All of it comes over in one wait, when everything else of the step is queued, and perhaps the next step.

Shapes: B running requests, K drafted tokens, L = K + 1 target positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from blockroll.errors import EmptySupport, NonFiniteLogits
from blockroll.kernels.transfer import Fetch
from blockroll.types import Draft, Verdict

EMPTY = f"{EmptySupport.__name__}: constraint, masks and logits processors leave no next token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """What may be wrong, by request; None: nothing is."""

    drafts_B: Tensor | None  # bool, whose draft rows held NaN or infinity,
    targets_B: Tensor | None  # bool, and whose target rows did
    is_empty_BL: Tensor | None  # bool, rows that nothing may follow
    is_invalid_B: Tensor | None  # bool, whose drafts are none that a step can verify


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """By request; behind its committed tokens columns hold no meaning."""

    num_drafts: list[int]
    num_committed: list[int]
    token_ids: list[list[int]]
    is_draft: list[list[bool]]
    policy_logprobs: list[list[float]]
    behavior_logprobs: list[list[float]]
    failed: dict[int, tuple[int, str]]  # by place: tokens before the first row that is wrong, and what is
    not_finite: frozenset[int]  # places of requests whose rows held NaN or infinity
    is_invalid: bool  # whether the drafts are none that a step can verify: nothing else has a meaning then

    @property
    def num_accepted(self) -> list[int]:
        """Drafts that stand."""
        return [sum(is_draft) for is_draft in self.is_draft]

    def of(self, places: list[int]) -> "Outcome":
        """That of some of the requests, in this order."""
        return Outcome(
            num_drafts=[self.num_drafts[place] for place in places],
            num_committed=[self.num_committed[place] for place in places],
            token_ids=[self.token_ids[place] for place in places],
            is_draft=[self.is_draft[place] for place in places],
            policy_logprobs=[self.policy_logprobs[place] for place in places],
            behavior_logprobs=[self.behavior_logprobs[place] for place in places],
            failed={new: self.failed[old] for new, old in enumerate(places) if old in self.failed},
            not_finite=frozenset(new for new, old in enumerate(places) if old in self.not_finite),
            is_invalid=self.is_invalid,
        )


class Unread:
    """An outcome on its way to the host."""

    def __init__(
        self,
        draft: Draft,
        verdict: Verdict,
        policy_logprobs_BL: Tensor,
        flags: Flags,
        raised: Mapping[int, str],
    ) -> None:
        """`raised` says, by place, why rows may be empty."""
        self._raised = raised
        flagged = (flags.drafts_B, flags.targets_B, flags.is_empty_BL, flags.is_invalid_B)
        self._is_flagged = [each is not None for each in flagged]
        self._fetch = Fetch(
            [
                draft.num_drafts_B,
                verdict.num_committed_B,
                verdict.token_ids_BL,
                verdict.is_draft_BL,
                policy_logprobs_BL,
                verdict.behavior_logprobs_BL,
                *(each for each in flagged if each is not None),
            ]
        )

    def read(self) -> Outcome:
        """Waits for it."""
        num_drafts_B, num_committed_B, tokens_BL, is_draft_BL, policy_BL, behavior_BL, *found = (
            self._fetch.read()
        )
        drafts_B, targets_B, is_empty_BL, is_invalid_B = (
            found.pop(0) if is_flagged else None for is_flagged in self._is_flagged
        )
        not_finite = [np.flatnonzero(bad_B).tolist() for bad_B in (drafts_B, targets_B) if bad_B is not None]
        return Outcome(
            num_drafts=num_drafts_B.tolist(),
            num_committed=num_committed_B.tolist(),
            token_ids=tokens_BL.tolist(),
            is_draft=is_draft_BL.tolist(),
            policy_logprobs=policy_BL.tolist(),
            behavior_logprobs=behavior_BL.tolist(),
            failed=_failures(drafts_B, targets_B, is_empty_BL, num_committed_B, self._raised),
            not_finite=frozenset(place for places in not_finite for place in places),
            is_invalid=is_invalid_B is not None and bool(is_invalid_B.any()),
        )


def _failures(
    drafts_B: np.ndarray | None,
    targets_B: np.ndarray | None,
    is_empty_BL: np.ndarray | None,
    num_committed_B: np.ndarray,
    raised: Mapping[int, str],
) -> dict[int, tuple[int, str]]:
    """By place, how many tokens stand before what went wrong, and what."""
    failed = {}
    for name, bad_B in (("draft", drafts_B), ("verify", targets_B)):
        for slot in [] if bad_B is None else np.flatnonzero(bad_B).tolist():
            failed[slot] = (0, f"{NonFiniteLogits.__name__}: {name} logits hold NaN or infinity")
    if is_empty_BL is not None:
        # A row behind the last committed token decided nothing.
        is_met_BL = is_empty_BL & (np.arange(is_empty_BL.shape[1]) < num_committed_B[:, None])
        for slot in np.flatnonzero(is_met_BL.any(axis=1)).tolist():
            failed.setdefault(slot, (int(is_met_BL[slot].argmax()), raised.get(slot, EMPTY)))
    return failed
