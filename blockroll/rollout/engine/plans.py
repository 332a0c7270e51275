"""Which plan a step takes: what an engine asks of whoever chooses, and what a policy can follow."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from blockroll.errors import InvalidInput
from blockroll.policies.base import Policy
from blockroll.rollout.engine.drafting import Drafter
from blockroll.types import Plan, PlanKind


class PlanChooser(Protocol):
    """Chooses the plan of each step, and is told what the step took."""

    @property
    def candidates(self) -> tuple[Plan, ...]:
        """All that it may ever choose."""
        ...

    def choose(self, batch_size: int, context: int) -> Plan:
        """The plan of the next step of so many requests, the longest of `context` tokens."""
        ...

    def observe(
        self,
        plan: Plan,
        batch_size: int,
        context: int,
        seconds: float,
        num_tokens: int,
        *,
        start_seconds: float = 0.0,
    ) -> None:
        """A step took so long, prefill excluded, `start_seconds` of it for first proposals."""
        ...


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
