"""What a step did for one request: the one thing that is counted of decoding, and what follows from counts.

Steps are counted by what they did, not one by one: a rollout has a few dozen different ones at most.
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from blockroll.types.plan import Plan


class RequestStep(NamedTuple):
    """One step of one request; equal ones are counted together."""

    plan: Plan
    level: int | None  # of the proposal that its drafts came from; None: they came from none
    num_drafts: int  # submitted to verify
    is_draft: tuple[bool, ...]  # by token that it drew: an accepted draft, or drawn from the target
    num_kept: int  # of these tokens: fewer where an end token, a stop string or `max_tokens` cut the rest off

    @property
    def num_accepted(self) -> int:
        """Accepted drafts that were committed."""
        return sum(self.is_draft[: self.num_kept])

    @property
    def verdicts(self) -> tuple[bool, ...]:
        """Of the drafts that it reached, those that a token was drawn at: whether each was accepted.

        As they were drawn: an end token among them cuts none off. Where the first position is settled by
        itself, the second is reached whether or not the first draft was accepted.
        """
        return self.is_draft[: self.num_drafts]

    @property
    def num_recovered(self) -> int:
        """Committed tokens that stand where a draft was rejected."""
        return len(self.verdicts[: self.num_kept]) - sum(self.verdicts[: self.num_kept])

    @property
    def num_extra(self) -> int:
        """Committed tokens behind its drafts; of a plain plan none."""
        return max(0, self.num_kept - self.num_drafts) if self.plan.num_drafts else 0


StepCounts = tuple[tuple[RequestStep, int], ...]  # how many steps did just that, in the order of the first


def counted(counts: Iterable[StepCounts]) -> Counter[RequestStep]:
    """All of them together."""
    total: Counter[RequestStep] = Counter()
    for each in counts:
        for step, number in each:
            total[step] += number
    return total
