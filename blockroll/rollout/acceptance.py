"""Acceptance by draft position: how far into a block drafts hold."""

from blockroll.rollout.engine import StepRecord


class AcceptanceByPosition:
    """Counts verdicts by draft position. An engine's observer; position 1 is the first draft of a step.

    Invariant: at every position, accepted <= reached <= steps, and one is reached as often as the one before
    it was accepted, unless a step has fewer drafts. Verdicts are counted as they are drawn: accepted drafts
    that an end token or `max_tokens` cuts off count here, and not in a rollout's acceptance rate.
    """

    def __init__(self, num_drafts: int) -> None:
        """`num_drafts` is the most that a step has."""
        self.num_steps = 0  # of single requests, with at least one draft
        self.num_reached_K = [0] * num_drafts  # steps that had a draft there and accepted all before it
        self.num_accepted_K = [0] * num_drafts  # steps that accepted the draft there, and all before it

    def __call__(self, record: StepRecord) -> None:
        """Count one step of a batch."""
        drafts = record.draft.num_drafts_B.tolist()
        accepted = record.verdict.num_accepted_B.tolist()
        for num_drafts, num_accepted in zip(drafts, accepted, strict=True):
            self.num_steps += num_drafts > 0
            for position in range(min(num_accepted + 1, num_drafts)):
                self.num_reached_K[position] += 1
            for position in range(num_accepted):
                self.num_accepted_K[position] += 1

    @property
    def conditional(self) -> tuple[float | None, ...]:
        """Accepted at each position / reached it; None where none did."""
        pairs = zip(self.num_accepted_K, self.num_reached_K, strict=True)
        return tuple(accepted / reached if reached else None for accepted, reached in pairs)

    @property
    def at_least(self) -> tuple[float | None, ...]:
        """Share of steps that accepted so many drafts or more; their sum is the mean number accepted."""
        steps = self.num_steps
        return tuple(accepted / steps if steps else None for accepted in self.num_accepted_K)
