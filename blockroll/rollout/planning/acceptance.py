"""Acceptance by draft position: how far into a block drafts hold."""

from blockroll.rollout.engine.trace import StepTrace


class AcceptanceByPosition:
    """Counts verdicts by draft position. An engine's observer; position 1 is the first draft of a step.

    A position is reached if the step commits a token there. Where the first position is settled by itself,
    the second is reached whether or not the first draft was accepted. Verdicts are counted as they are drawn:
    accepted drafts that an end token or `max_tokens` cuts off count here, and not in a rollout's acceptance
    rate.
    """

    def __init__(self, num_drafts: int) -> None:
        """`num_drafts` is the most that a step has."""
        self.num_steps = 0  # of single requests, with at least one draft
        self._num_reached_K = [0] * num_drafts  # steps that had a draft there and committed a token there
        self._num_accepted_K = [0] * num_drafts  # steps that accepted the draft there
        self._num_at_least_K = [0] * num_drafts  # steps that accepted so many drafts, or more

    def __call__(self, record: StepTrace) -> None:
        """Count one step of a batch."""
        rows = zip(
            record.draft.num_drafts_B.tolist(),
            record.verdict.num_committed_B.tolist(),
            record.verdict.is_draft_BL.tolist(),
            strict=True,
        )
        for num_drafts, num_committed, is_draft_L in rows:
            self.num_steps += num_drafts > 0
            num_accepted = 0
            for position in range(min(num_committed, num_drafts)):
                self._num_reached_K[position] += 1
                if is_draft_L[position]:
                    self._num_accepted_K[position] += 1
                    self._num_at_least_K[num_accepted] += 1
                    num_accepted += 1

    @property
    def conditional(self) -> tuple[float | None, ...]:
        """Accepted at each position / reached it; None where none did."""
        pairs = zip(self._num_accepted_K, self._num_reached_K, strict=True)
        return tuple(accepted / reached if reached else None for accepted, reached in pairs)

    @property
    def at_least(self) -> tuple[float | None, ...]:
        """Share of steps that accepted so many drafts or more; their sum is the mean number accepted."""
        steps = self.num_steps
        return tuple(count / steps if steps else None for count in self._num_at_least_K)
