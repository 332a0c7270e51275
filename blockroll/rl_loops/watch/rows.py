"""What rows of metrics.jsonl say, taken together: series, counts, tests of the guard, stretches of fallback.

A row without a key says nothing of it; null and what is not finite are a step without a value.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Rows = Sequence[Mapping[str, Any]]

AS_ASKED = "as_asked"  # `guard/mode` of rollouts that were drawn as the config says
_LOG_E = "/log_e"


@dataclass(frozen=True, slots=True, kw_only=True)
class TestEvidence:
    """One sequential test of the guard as its last row has it: of its latest attempt, if it was lifted."""

    name: str
    log_e: float  # nats
    highest: float  # nats, at any step
    threshold: float  # nats: log(1 / alpha)
    num_values: int  # that it has seen
    spoke_at: int | None  # the first step of the run whose highest log e reached the threshold

    @property
    def nearness(self) -> float:
        """The highest log e as a share of the threshold: 1 is where the test speaks."""
        return self.highest / self.threshold


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Successive steps whose rollouts were drawn otherwise than asked, because the guard said so."""

    mode: str  # "lossless" or "plain"
    first: int
    last: int


def series(rows: Rows, key: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have one."""
    return [(float(row["step"]), float(row[key])) for row in rows if _is_number(row.get(key))]


def evaluations(rows: Rows) -> list[tuple[float, float]]:
    """(step, mean reward) on held-out prompts; step 0 is the policy the run started from."""
    before = [(step - 1, value) for step, value in series(rows[:1], "eval/initial_reward")]
    return before + series(rows, "eval/reward")


def counted(rows: Rows, key: str) -> float | None:
    """How far a `*_total` has counted, though it may begin anew with a process; None: no row has it."""
    values = [value for _, value in series(rows, key)]
    if not values:
        return None
    steps = zip([0.0, *values], values, strict=False)
    return sum(now - before if now >= before else now for before, now in steps)


def is_guarded(rows: Rows) -> bool:
    """Whether a guard watched any of the steps."""
    return any("guard/mode" in row or any(key.startswith("drift/") for key in row) for row in rows)


def _tests(rows: Rows) -> list[str]:
    """Tests of the guard that had data, in the order in which they first had."""
    names = {
        key.removeprefix("drift/").removesuffix(_LOG_E): None
        for row in rows
        for key in row
        if key.startswith("drift/") and key.endswith(_LOG_E)
    }
    return [name for name in names if series(rows, f"drift/{name}{_LOG_E}")]


def evidence_of(rows: Rows) -> list[TestEvidence]:
    """Of every test of the guard: those that spoke first, then the nearest to its threshold."""
    found = (_state(rows, name) for name in _tests(rows))
    return sorted(found, key=lambda test: (test.spoke_at is None, -test.nearness))


def _state(rows: Rows, name: str) -> TestEvidence:
    def last(what: str) -> float:
        return series(rows, f"drift/{name}/{what}")[-1][1]

    highest = series(rows, f"drift/{name}/log_e_max")
    thresholds = dict(series(rows, f"drift/{name}/threshold"))
    spoke = [step for step, value in highest if value >= thresholds.get(step, math.inf)]
    return TestEvidence(
        name=name,
        log_e=last("log_e"),
        highest=highest[-1][1],
        threshold=last("threshold"),
        num_values=int(last("n")),
        spoke_at=int(spoke[0]) if spoke else None,
    )


def stretches(rows: Rows) -> list[Stretch]:
    """When rollouts were not drawn as asked, in order."""
    found: list[Stretch] = []
    before = AS_ASKED
    for row in rows:
        mode = row.get("guard/mode") or AS_ASKED
        if mode != AS_ASKED:
            first = found.pop().first if mode == before else int(row["step"])
            found.append(Stretch(mode=mode, first=first, last=int(row["step"])))
        before = mode
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
