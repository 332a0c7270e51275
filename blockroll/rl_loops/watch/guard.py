"""The guard: tests that may be read after every step, and what is done once one of them has spoken.

It is fed with numbers and knows no loop, policy or pool:

    guard = Guard([Test(name="reward", alpha=0.05, action="lossless", sides="below", claim="...")])
    guard.observe("reward", values, low=0.495)  # in [0, 1], claimed to have a mean of at least 0.495
    decision = guard.decide(step)               # None, or what to do from the next step on, and why

False alarms: over a whole run a test speaks though its claim is true with probability at most its alpha, and
any of them with at most the sum of all alphas, which may not exceed the budget (Ville's inequality and the
union bound). Where a fallback may be lifted, attempt k of a test has alpha / (k (k + 1)): these sum to alpha.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from blockroll.errors import CheckpointError, InvalidInput
from blockroll.rl_loops.watch.e_process import EProcess, Sides
from blockroll.rollout.calibration.bets import Bets

Action = Literal["warn", "lossless", "plain", "stop"]
Mode = Literal["as_asked", "lossless", "plain"]
Lift = Literal["never", "by_hand", "evidence"]
ACTIONS: tuple[Action, ...] = get_args(Action)  # from the mildest on
_MODES: dict[str, Mode] = {"lossless": "lossless", "plain": "plain"}
_WHAT = {
    "warn": "nothing changes",
    "lossless": "from the next step on rollouts are lossless",
    "plain": "from the next step on rollouts are lossless and decoded plainly",
    "stop": "the run stops",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Test:
    """One claim, and what is done once it is refuted at `alpha`."""

    __test__ = False  # pytest takes classes of this name for its own

    name: str
    alpha: float  # over the whole run
    action: Action
    claim: str  # what it tests, in words
    sides: Sides = "both"  # where the mean is claimed not to be

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise InvalidInput(f"alpha of test {self.name!r} must be between 0 and 1, got {self.alpha}")
        if self.action not in ACTIONS:
            raise InvalidInput(
                f"the action of test {self.name!r} must be one of {', '.join(ACTIONS)}, got {self.action!r}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the guard decided at the end of a step."""

    step: int
    action: Action | Literal["lift"]
    tests: tuple[str, ...]  # those that spoke
    said: str  # in words


class Guard:
    """Evidence of every test, and the mode that rollouts are drawn in. A test that has spoken is silent."""

    def __init__(self, tests: Sequence[Test], *, budget: float = 0.1, lift: Lift = "by_hand") -> None:
        """`lift`: whether a fallback is for good, or ended by `lift()`, or also by what `observe_again` saw.

        InvalidInput for two tests of one name, and for alphas that sum to more than `budget`.
        """
        self.tests = {test.name: test for test in tests}
        if len(self.tests) < len(tests):
            names = [test.name for test in tests]
            raise InvalidInput(f"tests need different names, got {names}")
        total = math.fsum(test.alpha for test in tests)
        if total > budget * (1 + 1e-9):
            raise InvalidInput(
                f"the alphas of all tests sum to {total:g}, above the budget of {budget:g}: lower some, "
                "leave a test out, or allow more false alarms by a larger budget"
            )
        if lift not in get_args(Lift):
            raise InvalidInput(f"lift must be one of {', '.join(get_args(Lift))}, got {lift!r}")
        self.budget, self.lifting = budget, lift
        self.mode: Mode = "as_asked"
        self.num_fallbacks = 0
        self.decision: Decision | None = None  # the latest
        self.evidence = {name: EProcess(test.sides) for name, test in self.tests.items()}
        self._attempts = dict.fromkeys(self.tests, 1)
        self._has_spoken = dict.fromkeys(self.tests, False)
        self._again = EProcess("above")  # that what was fallen back from does no harm after all

    def observe(
        self,
        test: str,
        values: Sequence[float] | np.ndarray,
        *,
        low: float | np.ndarray = 0.0,
        high: float | np.ndarray = 1.0,
    ) -> None:
        """Values in [0, 1], in the order they came about, each claimed to have a mean in [low, high].

        The claim of a value must be fixed before the value is known. InvalidInput for other values, NaN too.
        """
        self.add(test, Bets.on(np.asarray(values, dtype=np.float64), low, high))

    def add(self, test: str, bets: Bets) -> None:
        """Bets that were placed elsewhere, as by the engines of a pool."""
        if test not in self.evidence:
            raise InvalidInput(f"the guard has no test {test!r}; it has {', '.join(self.tests) or 'none'}")
        if bets.num_values:
            self.evidence[test].add(bets)

    def observe_again(self, values: Sequence[float] | np.ndarray, *, high: float) -> None:
        """In a fallback: values whose mean is above `high` only if what was fallen back from does no harm."""
        if self.mode != "as_asked" and len(values):
            self._again.add(Bets.on(np.asarray(values, dtype=np.float64), 0.0, high))

    def alpha(self, test: str) -> float:
        """Of the attempt that a test is at."""
        alpha, attempt = self.tests[test].alpha, self._attempts[test]
        return alpha if self.lifting == "never" else alpha / (attempt * (attempt + 1))

    def threshold(self, test: str) -> float:
        """The evidence, in nats, at which a test speaks."""
        return -math.log(self.alpha(test))

    def decide(self, step: int) -> Decision | None:
        """What the evidence so far asks for, the gravest action first; None: nothing new."""
        spoke = [
            name
            for name, evidence in self.evidence.items()
            if not self._has_spoken[name] and evidence.log_e_max >= self.threshold(name)
        ]
        if spoke:
            return self._speak(step, spoke)
        if self.mode != "as_asked" and self.lifting == "evidence":
            alphas = [self.alpha(name) for name, has_spoken in self._has_spoken.items() if has_spoken]
            if self._again.log_e_max >= -math.log(min(alphas)):
                said = (
                    f"by evidence that what it fell back from does no harm, log e {self._again.log_e_max:.1f}"
                )
                return self.lift(step, why=said)
        return None

    def _speak(self, step: int, names: list[str]) -> Decision:
        for name in names:
            self._has_spoken[name] = True
        action = max((self.tests[name].action for name in names), key=ACTIONS.index)
        if action in _MODES and (self.mode, action) not in (("lossless", "lossless"), ("plain", "lossless")):
            self.num_fallbacks += 1
            self._again = EProcess("above")
            self.mode = _MODES[action]
        said = "; ".join(self._sentence(name) for name in names)
        self.decision = Decision(
            step=step, action=action, tests=tuple(names), said=f"{said}: {_WHAT[action]}"
        )
        return self.decision

    def _sentence(self, name: str) -> str:
        evidence = self.evidence[name]
        return (
            f"{name}: log e {evidence.log_e_max:.1f} over {self.threshold(name):.1f} (alpha "
            f"{self.alpha(name):g}) after {evidence.num_values} values, against: {self.tests[name].claim}"
        )

    def lift(self, step: int, *, why: str = "by hand") -> Decision | None:
        """End a fallback: the tests that spoke begin anew, at their next alpha. None: no test has spoken.

        InvalidInput where a fallback is for good.
        """
        if self.lifting == "never":
            raise InvalidInput(
                "this guard's fallbacks are for good (lift='never'), so that each test has all of its alpha"
            )
        spoke = [name for name, has_spoken in self._has_spoken.items() if has_spoken]
        if not spoke:
            return None
        for name in spoke:
            self._attempts[name] += 1
            self._has_spoken[name] = False
            self.evidence[name] = EProcess(self.tests[name].sides)
        if self.mode == "as_asked":
            said = f"{', '.join(spoke)} begin anew {why}"
        else:
            said = f"the fallback is lifted {why}: from the next step on rollouts are drawn as asked"
        self.mode = "as_asked"
        self.decision = Decision(step=step, action="lift", tests=tuple(spoke), said=said)
        return self.decision

    @property
    def alpha_spent(self) -> float:
        """Of the budget, by tests that have spoken, in all their attempts."""
        spent = 0.0
        for name, test in self.tests.items():
            attempts = self._attempts[name] - (not self._has_spoken[name])
            if self.lifting == "never":
                spent += test.alpha * attempts
            else:
                spent += test.alpha * (1 - 1 / (attempts + 1))
        return spent

    def metrics(self) -> dict[str, float | str]:
        """`drift/...` of every test that has seen anything, and `guard/mode`."""
        found: dict[str, float | str] = {}
        for name, evidence in self.evidence.items():
            if evidence.num_values:
                found[f"drift/{name}/log_e"] = evidence.log_e
                found[f"drift/{name}/log_e_max"] = evidence.log_e_max
                found[f"drift/{name}/n"] = float(evidence.num_values)
                found[f"drift/{name}/threshold"] = self.threshold(name)
        return {
            **found,
            "drift/fallback_total": float(self.num_fallbacks),
            "drift/alpha_spent": self.alpha_spent,
            "guard/mode": self.mode,
        }

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` goes on from; plain values, so that JSON and torch both keep it."""
        return {
            "tests": {name: _identity(test) for name, test in self.tests.items()},
            "lift": self.lifting,
            "mode": self.mode,
            "num_fallbacks": self.num_fallbacks,
            "attempts": dict(self._attempts),
            "has_spoken": dict(self._has_spoken),
            "evidence": {name: each.state_dict() for name, each in self.evidence.items()},
            "again": self._again.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`. CheckpointError if that was of other tests, alphas or claims."""
        found = _differences(state["tests"], {name: _identity(test) for name, test in self.tests.items()})
        if self.lifting != state["lift"]:
            found.append(f"lift {self.lifting!r}, it was {state['lift']!r}")
        if found:
            raise CheckpointError(
                f"the guard goes on with {', '.join(found)}: evidence of other tests is none for these; "
                "resume with the options the run began with, or start another run"
            )
        self.mode, self.num_fallbacks = state["mode"], int(state["num_fallbacks"])
        self._attempts, self._has_spoken = dict(state["attempts"]), dict(state["has_spoken"])
        for name, evidence in self.evidence.items():
            evidence.load_state_dict(state["evidence"][name])
        self._again.load_state_dict(state["again"])


def _identity(test: Test) -> dict[str, Any]:
    """What makes a test the same one; what it does may change."""
    return {"alpha": test.alpha, "claim": test.claim, "sides": test.sides}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = [f"no test {name!r}" for name in before if name not in now]
    found += [f"a new test {name!r}" for name in now if name not in before]
    return found + [
        f"test {name!r} of {what} {now[name][what]!r}, it was {before[name][what]!r}"
        for name in now
        if name in before
        for what in now[name]
        if now[name][what] != before[name][what]
    ]
