"""What `rollout.plan` asks for, read: a fixed plan, or a planner."""

from typing import TYPE_CHECKING

from blockroll.rollout.planning.candidates import candidate_plans, read_costs, recorded_tokens
from blockroll.rollout.planning.planner import AUTO, Planner
from blockroll.types import Plan

if TYPE_CHECKING:
    from blockroll.policies.hf import HFPolicy


def read_plan(
    text: str, policy: "HFPolicy", *, with_mask_rows: bool = True, with_history: bool = True
) -> Plan | Planner:
    """What `rollout.plan` asks for: `auto`, or a fixed plan as `Plan.parse` reads it.

    `auto` chooses among plain decoding, drafts from mask rows and drafts from history.
    """
    if text.strip() == AUTO:
        candidates = candidate_plans(policy, with_mask_rows=with_mask_rows, with_history=with_history)
        return Planner(candidates, costs=read_costs(policy), known_tokens=recorded_tokens(policy))
    return Plan.parse(text, default_drafts=policy.trained_drafts or 1)
