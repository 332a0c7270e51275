"""Acceptance by draft position: how far into a block drafts hold."""

from collections.abc import Mapping

from blockroll.types import RequestStep


class AcceptanceByPosition:
    """Of counted steps; position 1 is the first draft of a step.

    A position is reached if the step drew a token there. Where the first position is settled by itself,
    the second is reached whether or not the first draft was accepted. Verdicts are counted as they were
    drawn: accepted drafts that an end token or `max_tokens` cuts off count here, and not in a rollout's
    acceptance rate.
    """

    def __init__(self, counts: Mapping[RequestStep, int]) -> None:
        """Request-steps by what they did."""
        drafted = [(step.verdicts, count) for step, count in counts.items() if step.num_drafts]
        most = max((step.num_drafts for step in counts), default=0)
        self.num_steps = sum(count for _, count in drafted)  # of single requests, with at least one draft
        self._num_reached_K, self._num_accepted_K = [0] * most, [0] * most
        self._num_of_length = [0] * (most + 1)  # steps that accepted just so many drafts
        for verdicts, count in drafted:
            self._num_of_length[sum(verdicts)] += count
            for position, is_accepted in enumerate(verdicts):
                self._num_reached_K[position] += count
                self._num_accepted_K[position] += count * is_accepted

    @property
    def conditional(self) -> tuple[float | None, ...]:
        """Accepted at each position / reached it; None where none did."""
        pairs = zip(self._num_accepted_K, self._num_reached_K, strict=True)
        return tuple(accepted / reached if reached else None for accepted, reached in pairs)

    @property
    def length_shares(self) -> tuple[float, ...]:
        """Share of steps that accepted just 0, 1 and so on drafts; empty where no step had drafts."""
        return tuple(count / self.num_steps for count in self._num_of_length) if self.num_steps else ()

    @property
    def at_least(self) -> tuple[float, ...]:
        """Share of steps that accepted 1, 2 and so on drafts or more; their sum is the mean accepted."""
        steps, lengths = self.num_steps, self._num_of_length
        return tuple(sum(lengths[number:]) / steps for number in range(1, len(lengths)) if steps)
