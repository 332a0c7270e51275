"""Which plan a step takes: what an engine asks of whoever chooses, and what a policy can follow."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from blockroll.errors import InvalidInput
from blockroll.policies.base import Policy
from blockroll.rollout.engine.drafting import Drafter
from blockroll.rollout.engine.ragged import least_saved
from blockroll.rollout.engine.running import RunningRequest
from blockroll.types import Plan, PlanKind


@dataclass(frozen=True, slots=True, kw_only=True)
class NextStep:
    """What a plan is chosen for."""

    batch_size: int
    context: int  # tokens of the longest text
    num_joining: int = 0  # requests that were in no step before
    has_prefill: bool = False  # whether rows of prompts are computed right before it
    least_saved: float  # rows by which a packed forward is smaller than a padded one, or it is not packed
    # A drafter's name, K and the least chance of a draft -> what it expects, as `Drafter.outlook` says.
    outlook: Callable[[str, int, float], Sequence[Sequence[float]] | None]

    @classmethod
    def of(
        cls,
        batch: Sequence[RunningRequest],
        drafters: Mapping[str, Drafter],
        policy: Policy,
        *,
        num_joining: int = 0,
        has_prefill: bool = False,
    ) -> "NextStep":
        """That of these requests."""
        return cls(
            batch_size=len(batch),
            context=max([running.num_tokens for running in batch]),
            num_joining=num_joining,
            has_prefill=has_prefill,
            least_saved=least_saved(policy),
            outlook=lambda name, *asked: drafters[name].outlook(batch, *asked),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The plan of a step, and of so many steps from it on unless a request joins or leaves before."""

    plan: Plan
    lengths: Sequence[int] | None = None  # most drafts of each request; None: as the drafter sees fit
    num_steps: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsTaken:
    """What the steps of one choice took, prefill excluded, and committed; all had the same requests."""

    plan: Plan
    batch_size: int
    step_seconds: Sequence[float]  # of drafting, verifying and committing, step by step
    start_seconds: float = 0.0  # of those, for first proposals of a fused plan
    choice_seconds: float = 0.0  # beside them, for the choice of the plan, and for learning from those before
    num_tokens: int

    @property
    def seconds(self) -> float:
        """Of all of them."""
        return sum(self.step_seconds)


class PlanChooser(Protocol):
    """Chooses the plan of each step, and is told what the steps took."""

    @property
    def candidates(self) -> tuple[Plan, ...]:
        """All that it may ever choose."""
        ...

    @property
    def speedups(self) -> tuple[float, float]:
        """Predicted and achieved tokens per second of its steps so far, over those of plain steps."""
        ...

    def choose(self, step: NextStep) -> Choice:
        """How the next step decodes, or more than one."""
        ...

    def observe(self, taken: StepsTaken) -> None:
        """Steps of the last choice have run, without a prefill in them: told once, before the next choice."""
        ...


class Planning:
    """Asks a planner whenever its last choice holds no longer, and counts what that takes.

    Learning from steps is part of the next choice.
    """

    def __init__(
        self,
        planner: PlanChooser,
        drafters: Mapping[str, Drafter],
        policy: Policy,
        clock: Callable[[], float],
    ) -> None:
        self.planner = planner
        self._drafters, self._policy, self._clock = drafters, policy, clock
        self._choice = Choice(plan=planner.candidates[0])
        self._batch_size = 0
        self._num_held = 0  # steps that the choice holds for
        self._step_seconds: list[float] = []
        self._start_s, self._choice_s, self._learning_s = 0.0, 0.0, 0.0
        self._num_tokens = 0

    def choose(
        self, batch: Sequence[RunningRequest], num_joining: int, *, has_prefill: bool = False
    ) -> tuple[Choice, float]:
        """The choice for a step, and the seconds that it took."""
        if not num_joining and self.holds(len(batch)):
            self._num_held -= 1
            return self._choice, 0.0
        since = self._clock() - self._learning_s
        self._num_held = 0  # if asking raises, the next step asks again
        self._tell()
        step = NextStep.of(
            batch, self._drafters, self._policy, num_joining=num_joining, has_prefill=has_prefill
        )
        self._choice = self.planner.choose(step)
        self._batch_size, self._num_held = len(batch), self._choice.num_steps - 1
        self._learning_s = 0.0
        seconds = self._clock() - since
        self._choice_s += seconds
        return self._choice, seconds

    def holds(self, batch_size: int) -> bool:
        """Whether the choice holds for one step more of so many requests."""
        return self._num_held > 0 and batch_size == self._batch_size

    def observe(
        self, *, seconds: float, start_seconds: float, num_tokens: int, is_last: bool, is_followed: bool
    ) -> None:
        """A step has run, without a prefill in it.

        `is_last` says that its requests will not run together, `is_followed` that another one of its choice
        has begun already.
        """
        self._step_seconds.append(seconds)
        self._start_s += start_seconds
        self._num_tokens += num_tokens
        if not is_followed and (is_last or not self._num_held):
            since = self._clock()
            self._tell()
            self._learning_s = self._clock() - since

    def _tell(self) -> None:
        """Of all steps of the choice that are not told yet."""
        step_seconds, self._step_seconds = self._step_seconds, []
        if not step_seconds:
            return
        taken = StepsTaken(
            plan=self._choice.plan,
            batch_size=self._batch_size,
            step_seconds=step_seconds,
            start_seconds=self._start_s,
            choice_seconds=self._choice_s,
            num_tokens=self._num_tokens,
        )
        self._num_held, self._num_tokens, self._start_s, self._choice_s = 0, 0, 0.0, 0.0
        self.planner.observe(taken)


def by_name(drafters: Iterable[Drafter]) -> dict[str, Drafter]:
    """Drafters by the names that plans know them by; InvalidInput where two have one name."""
    named: dict[str, Drafter] = {}
    for drafter in drafters:
        if drafter.name in named:
            raise InvalidInput(
                f"two drafters are called {drafter.name!r}: {named[drafter.name]!r} and {drafter!r}; plans "
                "could not say which is meant, so give one another name"
            )
        named[drafter.name] = drafter
    return named


def at_hand(own: Iterable[Drafter], given: Iterable[Drafter]) -> dict[str, Drafter]:
    """An engine's own drafters and those it was given, by name; one that is given stands for its like."""
    given = tuple(given)
    others = (each for each in own if not any(isinstance(one, type(each)) for one in given))
    return by_name((*others, *given))


def check_plan(plan: Plan, policy: Policy, drafters: Mapping[str, Drafter]) -> None:
    """Raise InvalidInput for a plan that policy or drafters cannot follow; its drafter may warn."""
    if plan.kind is PlanKind.PLAIN:
        return
    if plan.drafter not in drafters:
        raise InvalidInput(
            f"plan {plan.name} asks for the drafter {plan.drafter!r}, and this engine has "
            f"{', '.join(map(repr, drafters)) or 'none'}; hand it in by `drafters`, or make the engine by "
            "`blockroll.Engine`, which has those of the package"
        )
    if plan.num_drafts >= policy.max_length:
        raise InvalidInput(
            f"plan {plan.name} drafts {plan.num_drafts} tokens, but the policy's context holds "
            f"{policy.max_length}, one of them before the block; give K of at most {policy.max_length - 1}"
        )
    drafters[plan.drafter].check(plan, policy)


def drafters_of(plans: Iterable[Plan]) -> set[str]:
    """The names of all drafters that these plans ask for."""
    return {plan.drafter for plan in plans if plan.drafter}
