"""What a planner counts: tokens by plan, time that learning took, looks, and what a step was chosen for."""

import math
from dataclasses import dataclass, field

from blockroll.rollout.planning.costs import Work
from blockroll.types import Plan

_HALF_LIFE = 1024  # request-steps after which a count of tokens weighs half
_SHARE_TO_LOOK = 0.005  # of the time, that looks which find nothing may take,
_STEPS_TO_LOOK = 1.0  # beyond so many plain steps
_LONGEST_LOOK = 4.0  # plain steps that a look is charged: what took longer was a pause
_LOOKS_KEPT = 8  # of which the mean says what a look takes
_LEAST_WAIT = 8  # steps until a look that is not paid for
_MOST_SILENT = 31  # steps without a look behind looks that found nothing again and again


@dataclass(slots=True)
class Counts:
    """What the steps of one plan did, the older the lighter."""

    num_steps: float = 0.0  # request-steps
    num_tokens: float = 0.0
    step_s: float = 0.0  # of steps in use, without their starts,
    start_s: float = 0.0  # and of those: a fused plan starts with a draft forward for each new request

    def count(self, num_requests: int, num_tokens: int) -> None:
        """One step of so many requests committed so many tokens."""
        kept = 0.5 ** (num_requests / _HALF_LIFE)
        self.num_steps = kept * self.num_steps + num_requests
        self.num_tokens = kept * self.num_tokens + num_tokens
        self.step_s, self.start_s = kept * self.step_s, kept * self.start_s

    @property
    def start_share(self) -> float:
        """Time for starts over time for steps."""
        return self.start_s / self.step_s if self.step_s else 0.0


@dataclass(slots=True)
class Account:
    """Time that went into learning and has not come back, in plain steps."""

    unpaid: float = 0.0

    def add(self, plain_steps: float) -> None:
        """What a step has lost, or, below 0, saved."""
        self.unpaid = max(0.0, self.unpaid + plain_steps)


@dataclass(slots=True)
class Looks:
    """When to look into history next: seldom where looks find nothing, and not before that is paid for."""

    next_at: int = 0  # this many steps
    cost: float = 0.0  # of a look, in plain steps
    _account: Account = field(default_factory=Account)
    _num_silent: int = 0  # steps that the latest look is followed by without one,
    _most_silent: int = _MOST_SILENT  # at most: those that pay for one

    def is_due(self, num_steps: int, plain_steps: float) -> bool:
        """Whether to look at this step, behind so many, which are worth so many plain ones."""
        if num_steps < self.next_at:
            return False
        to_go = (self._account.unpaid - _STEPS_TO_LOOK) / _SHARE_TO_LOOK - plain_steps
        if to_go <= 0:
            return True
        self.next_at = num_steps + max(round(to_go), _LEAST_WAIT)
        return False

    def looked(self, num_steps: int, *, has_found: bool) -> None:
        """At this step; whether that gave drafts that are worth their rows."""
        self._num_silent = 0 if has_found else min(2 * self._num_silent + 1, self._most_silent)
        self.next_at = num_steps + 1 + self._num_silent

    def joined(self, num_steps: int) -> None:
        """A request has joined: history may know how it goes on."""
        self.next_at = min(self.next_at, num_steps)

    def charge(self, look: float, lost: float) -> None:
        """A look took so many plain steps, and the steps that it chose lost so many, or saved them."""
        look = min(look, _LONGEST_LOOK)
        self.cost += (look - self.cost) / _LOOKS_KEPT
        self._most_silent = min(math.ceil(look / _SHARE_TO_LOOK), _MOST_SILENT)
        self._account.add(look + lost)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What a step is expected to do; costs in plain steps, tokens of a request."""

    plan: Plan
    work: Work
    tokens: float
    rate: float  # tokens per plain step that the plan in use would have
    has_looked: bool = False
    is_trial: bool = False
    cost: float = 1.0  # as it was predicted
    is_measured: bool = True  # steps of its place were measured before
