"""What plain steps take now: the time that steps without any planner would have had.

By place, batch and context, from the plain steps that ran there; where none did, the latest of another place
in the proportion that the cost model gives. It follows a machine that slows down and speeds up within some
steps, and one pause moves it little.
"""

from blockroll.rollout.planning.costs import CostModel, Work

_WEIGHT = 1 / 8  # of a new step, and again for each step since the last plain one,
_MOST_WEIGHT = 1 / 2  # up to this
_FIRST = 3  # steps of a place of which the fastest counts: the first warms it up
_LONGEST = 4.0  # times what was expected: longer is a pause, and no step


class PlainTimes:
    """Seconds of plain steps, measured near in time."""

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs
        self._seconds: dict[Work, float] = {}
        self._num_steps: dict[Work, int] = {}
        self._latest: Work | None = None

    def observe(self, work: Work, seconds: float, num_others: int = 0) -> None:
        """A plain step took so long, behind so many others since the last plain one."""
        place = work.place
        weight = min(_WEIGHT * (1 + num_others), _MOST_WEIGHT)
        count = self._num_steps[place] = self._num_steps.get(place, 0) + 1
        before = self._seconds.get(place, seconds)
        if count <= _FIRST:
            self._seconds[place] = min(before, seconds)
        else:
            self._seconds[place] = before + weight * (min(seconds, _LONGEST * before) - before)
        self._latest = place

    def seconds(self, work: Work) -> float | None:
        """What a plain step of these requests would take; None before the first."""
        place = work.plain.place
        if place in self._seconds:
            return self._seconds[place]
        latest = self._latest
        if latest is None:
            return None
        return self._seconds[latest] * self._costs.plain_ratio(place, latest)
