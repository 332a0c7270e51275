"""What a planner counts: tokens by plan, time that learning took, and what a step was chosen for."""

from dataclasses import dataclass

from blockroll.rollout.planning.costs import Work
from blockroll.types import Plan

_HALF_LIFE = 1024  # request-steps after which a count of tokens weighs half


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
