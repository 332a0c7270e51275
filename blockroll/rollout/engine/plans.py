"""Which plan a step takes: what an engine asks of whoever chooses, and what a policy can follow."""

import warnings
from typing import Protocol

from blockroll.errors import InvalidInput
from blockroll.policies.base import Policy
from blockroll.types import Plan


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


def check_plan(plan: Plan, policy: Policy) -> None:
    """Raise InvalidInput for a plan the policy cannot follow; warn of more drafts than it was trained for."""
    if plan.num_drafts and not policy.can_draft:
        raise InvalidInput(
            f"plan {plan.name} needs a policy that drafts, and this one has neither a draft adapter nor a "
            "mask token; use 'plain', or make an adapter with `blockroll convert`"
        )
    if plan.num_drafts >= policy.max_length:
        raise InvalidInput(
            f"plan {plan.name} drafts {plan.num_drafts} tokens, but the policy's context holds "
            f"{policy.max_length}, one of them before the block; give K of at most {policy.max_length - 1}"
        )
    if plan.num_drafts > policy.trained_drafts:
        warnings.warn(
            f"plan {plan.name} drafts more than the {policy.trained_drafts} tokens this policy was "
            "trained for; the law stays exact, the later drafts will rarely be accepted",
            stacklevel=2,
        )
    elif plan.layout is not None and plan.layout not in policy.trained_layouts:
        warnings.warn(
            f"plan {plan.name} drafts in a layout this policy was not trained for, only for "
            f"{', '.join(policy.trained_layouts) or 'none'}; the law stays exact, fewer drafts are accepted",
            stacklevel=2,
        )
