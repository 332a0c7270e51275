"""What a step costs, in plain steps, fitted to the steps that were measured.

A line over forwards, requests, rows and context, of coefficients that are never negative, gives the time of
a step up to a unit; what a place was measured to take beyond it is kept beside it. Where nothing was measured
the line is the answer, drawn towards a usual one while there are few places.

A step is measured against the plain steps just before it, at about the same batch and context, and the first
few of a place, where there are none, against others: what those would have taken if they had been plain. So a
machine that slows down and speeds up changes no cost, and a step among its likes teaches nothing.

The model is kept between processes, for one kind of policy on one kind of machine; its name is a hash of
both. A file that is lost or damaged costs nothing but measuring again.
"""

import contextlib
import functools
import json
import logging
import math
import operator
import os
import statistics
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

from blockroll.types import Plan, PlanKind

logger = logging.getLogger(__name__)

SAMPLES_KEPT = 12  # of a place, the newest
VERIFY = "verify"  # the kind of work of steps with one forward that drafts nothing, plain ones too
_KEY = "plain_steps_per_step"
_SHORTEST_CONTEXT = 64  # below, a step costs the same
_NEIGHBOURS = 5  # steps before a step that it is measured against
_BELIEVED = 3  # measured steps of a place that may go by others
_PRIOR_SAMPLES = 3.0  # that a place weighs against the others of its kind
# Time of a forward, a request in it, a row, 1,024 tokens of context of a request and of a row: usual ones, in
# forwards, and how much they weigh, where a measured place weighs up to 4.
_USUAL = (1.0, 0.02, 0.02, 0.01, 0.002)
_USUAL_WEIGHT = 0.05
_SWEEPS = 30


class Work(NamedTuple):
    """What the time of a step goes by."""

    kind: str  # `VERIFY`, or the plan's kind
    forwards: int
    batch_size: int
    rows: int  # of all requests and forwards
    context: int  # tokens of the longest text

    @classmethod
    def of(cls, plan: Plan, batch_size: int, context: int) -> "Work":
        """That of a step in which every request has the plan's rows."""
        kind = VERIFY if plan.kind in (PlanKind.PLAIN, PlanKind.ONE_FORWARD) else plan.kind.value
        forwards = plan.forwards_per_step
        return cls(kind, forwards, batch_size, forwards * plan.rows_per_forward * batch_size, context)

    @property
    def is_plain(self) -> bool:
        """Whether it is one row for each request."""
        return self.kind == VERIFY and self.rows == self.batch_size

    @property
    def plain(self) -> "Work":
        """That of a plain step of the same requests."""
        return Work(VERIFY, 1, self.batch_size, self.batch_size, self.context)

    @property
    def place(self) -> "Work":
        """Steps of about equal cost: context rounded up to powers of two, the others to their roots."""
        return _place(*self[:4], (max(self.context, _SHORTEST_CONTEXT) - 1).bit_length())

    @property
    def features(self) -> tuple[float, ...]:
        """What the line is over."""
        requests, depth = self.forwards * self.batch_size, self.context / 1024
        return (self.forwards, requests, self.rows, requests * depth, self.rows * depth)


@dataclass(slots=True)
class _Place:
    """The newest steps that were measured, and by how much they exceed the line, as a logarithm."""

    samples: deque[tuple[Work, float]] = field(default_factory=lambda: deque(maxlen=SAMPLES_KEPT))
    excess: float = 0.0


class CostModel:
    """Plain steps that a step takes, at its batch and context."""

    def __init__(self, path: Path | None = None) -> None:
        """Nothing is measured; `save` writes to `path`, or nowhere."""
        self.path = path
        self._places: dict[Work, _Place] = {}
        self._excess: dict[str, float] = {}  # by kind
        self._line: Sequence[float] = _USUAL
        self._latest: deque[tuple[Work, Work, float]] = deque(maxlen=_NEIGHBOURS)  # place, logarithm of s
        self._met: set[Work] = set()  # places that ran in this process
        self._num_samples = self._num_unsaved = 0
        self._next_fit = 0

    def cost(self, work: Work) -> float:
        """Plain steps that such a step takes."""
        if work.is_plain:
            return 1.0
        cost = self._on_line(work) * math.exp(self._excess_at(work))
        return max(cost, 1.0) if work.kind == VERIFY else cost  # more rows never take less time

    def plain_seconds(self) -> float | None:
        """What a plain step would have taken just now; None before the first step."""
        units = [log_seconds - math.log(self.cost(work)) for work, _, log_seconds in self._latest]
        return math.exp(statistics.median(units)) if units else None

    def plain_ratio(self, work: Work, other: Work) -> float:
        """Time of a plain step of these requests over that of a plain step of others."""
        return _time(self._line, work.plain) / _time(self._line, other.plain)

    def num_samples(self, work: Work) -> int:
        """Measured steps of its place."""
        place = self._places.get(work.place)
        return len(place.samples) if place else 0

    def knows_like(self, plan: Plan) -> bool:
        """Whether a step of such a plan was measured, at any place; plain ones are the unit."""
        work = Work.of(plan, 1, 1)
        return work.is_plain or work.kind in self._excess

    def knows_rows_at(self, batch_size: int) -> bool:
        """Whether rows beside those of plain steps were measured at about this batch, or a larger one."""
        return any(4 * place.batch_size >= batch_size for place in self._places)

    def most_rows(self) -> int:
        """Rows of the widest verification that was measured, about; 0 before the first."""
        return max((place.rows for place in self._places if place.kind == VERIFY), default=0)

    def observe(self, work: Work, seconds: float) -> None:
        """Such a step took so long. The first of a place warms it up, and teaches nothing.

        Saves what an eighth of all measured steps has added: the first at once, later ones seldom.
        """
        if not 0 < seconds < math.inf:
            return
        place = work.place
        if place not in self._met:
            self._met.add(place)
            return
        if not work.is_plain and (units := self._units(place)):
            self._add(work, place, seconds / math.exp(statistics.median(units)))
        self._latest.append((work, place, math.log(seconds)))

    def _units(self, place: Work) -> list[float]:
        """Logarithms of the seconds of a plain step, as the steps before one of this place show them."""
        others = [each for each in self._latest if each[1] != place and _are_alike(each[1], place)]
        units = [log_seconds for work, _, log_seconds in others if work.is_plain]
        if units:
            return units
        if place in self._places and len(self._places[place].samples) >= _BELIEVED:
            return []
        return [log_seconds - math.log(self.cost(work)) for work, _, log_seconds in others]

    def _add(self, work: Work, at: Work, cost: float) -> None:
        place = self._places.setdefault(at, _Place())
        place.samples.append((work, cost))
        self._num_samples += 1
        self._num_unsaved += 1
        if self._num_samples >= self._next_fit or len(place.samples) == 1:
            self._fit()
            self._next_fit = self._num_samples + min(self._num_samples // 4, 256)
        else:
            place.excess = self._median_excess(place)
        if 8 * self._num_unsaved >= self._num_samples:
            self.save()

    def _on_line(self, work: Work) -> float:
        return _time(self._line, work) / _time(self._line, work.plain)

    def _excess_at(self, work: Work) -> float:
        of_kind = self._excess.get(work.kind, 0.0)
        place = self._places.get(work.place)
        if place is None:
            return of_kind
        count = len(place.samples)
        return (count * place.excess + _PRIOR_SAMPLES * of_kind) / (count + _PRIOR_SAMPLES)

    def _median_excess(self, place: _Place) -> float:
        return statistics.median(math.log(cost / self._on_line(work)) for work, cost in place.samples)

    def _fit(self) -> None:
        """The line with the least squares of relative errors, through the median of each place."""
        rows, weights = [], []
        for place in self._places.values():
            ratios = sorted((cost / self._on_line(work), work, cost) for work, cost in place.samples)
            _, work, cost = ratios[len(ratios) // 2]
            scale = cost * _time(self._line, work.plain)
            pairs = zip(work.features, work.plain.features, _USUAL, strict=True)
            rows.append([(each - cost * plain) * usual / scale for each, plain, usual in pairs])
            weights.append(min(len(ratios), 4) * (1.0 if work.kind == VERIFY else 0.25))
        scales = _least_squares(rows, weights)
        self._line = tuple(scale * usual for scale, usual in zip(scales, _USUAL, strict=True))
        by_kind: dict[str, list[float]] = {}
        for work, place in self._places.items():
            place.excess = self._median_excess(place)
            by_kind.setdefault(work.kind, []).append(place.excess)
        self._excess = {kind: statistics.median(excesses) for kind, excesses in by_kind.items()}

    @classmethod
    def load(cls, path: Path) -> Self:
        """The model kept at `path`; empty where there is none. A damaged file is ignored with a warning."""
        model = cls(path)
        try:
            for kind, *numbers, cost in json.loads(path.read_text())[_KEY]:
                work = Work(kind, *numbers)
                if not (isinstance(kind, str) and all(type(each) is int and each > 0 for each in numbers)):
                    raise ValueError(f"{work} is no work of a step")
                if not 0 < cost < math.inf:
                    raise ValueError(f"{work} took {cost}")
                model._places.setdefault(work.place, _Place()).samples.append((work, cost))
        except FileNotFoundError:
            return cls(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as damage:
            logger.warning("ignoring the damaged costs in %s, plans are measured again: %s", path, damage)
            return cls(path)
        model._num_samples = sum(len(place.samples) for place in model._places.values())
        model._fit()
        return model

    def save(self) -> None:
        """Replace the file in one move, so that a reader never sees half of it."""
        self._num_unsaved = 0
        if self.path is None:
            return
        kept = [[*work, cost] for place in self._places.values() for work, cost in place.samples]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _replace(self.path, json.dumps({_KEY: kept}))
        except OSError as refusal:
            logger.warning(
                "the costs in %s cannot be written, this process keeps its own: %s", self.path, refusal
            )
            self.path = None


@functools.lru_cache(maxsize=4096)
def _place(kind: str, forwards: int, batch_size: int, rows: int, log_context: int) -> Work:
    return Work(kind, forwards, _rounded(batch_size), _rounded(rows), 1 << log_context)


def _rounded(number: int) -> int:
    """Up to a power of the square root of two."""
    return math.ceil(2 ** (math.ceil(2 * math.log2(number) - 1e-9) / 2))


def _time(line: Sequence[float], work: Work) -> float:
    time: float = sum(map(operator.mul, line, work.features))
    return time


def _are_alike(place: Work, other: Work) -> bool:
    return place.batch_size == other.batch_size and place.context == other.context


def _least_squares(rows: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """Scales, none negative, that bring every row's sum to 0 as nearly as can be; the first is 1.

    The others stay close to 1 where rows say little.
    """
    size = len(_USUAL)
    matrix = [[_USUAL_WEIGHT * (i == j) for j in range(size)] for i in range(size)]
    for row, weight in zip(rows, weights, strict=True):
        for i, left in enumerate(row):
            for j, right in enumerate(row):
                matrix[i][j] += weight * left * right
    scales = [1.0] * size
    for _ in range(_SWEEPS):
        for i in range(1, size):
            others = sum(map(operator.mul, matrix[i], scales)) - matrix[i][i] * scales[i]
            scales[i] = max(0.0, (_USUAL_WEIGHT - others) / matrix[i][i])
    return scales


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
