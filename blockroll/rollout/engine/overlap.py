"""Which steps are queued before the one before them is read, so that a device never waits for the host.

Such a step is *in flight* until it is read, one call of the engine later. It holds whatever the one before it
turns out to have decided: anchors, positions, proposals and the rows of the cache follow from the verdict on
the device.
Where that has ended a request, the request's share of the step in flight is dropped, and where something
changes what forwards read, all of it: nothing of it is counted then, and whoever goes on decodes the same
step with the same coins, since these go by what was committed.

Whatever the host must know or do between two steps keeps them in turn: an end that is certain, requests that
join, pages that are short, guides and logits processors, drafts that go by texts.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from blockroll.errors import InvalidInput
from blockroll.kernels import transfer
from blockroll.policies.base import Policy
from blockroll.rollout.engine.cache.contract import Cache
from blockroll.rollout.engine.drafting import Drafter
from blockroll.rollout.engine.launched import Launched
from blockroll.rollout.engine.running import RunningRequest
from blockroll.types import Plan, PlanKind

Overlap = Literal["auto", "on", "off"]


def overlaps(policy: Policy, cache: Cache, overlap: Overlap) -> bool:
    """Whether steps overlap where they can. InvalidInput where they never could."""
    if overlap not in ("auto", "on", "off"):
        raise InvalidInput(f"overlap is {overlap!r}; allowed are 'auto', 'on' and 'off'")
    if overlap == "on" and policy.state_shape:
        raise InvalidInput(
            "overlap is 'on', and layers of this policy carry states, which stand where the host has read a "
            "step; use 'auto' or 'off'"
        )
    if overlap == "on" and not cache.has_ahead:
        raise InvalidInput("overlap is 'on', which needs the cache in pages; set cache to 'pages'")
    if overlap == "auto":
        return cache.has_ahead and not transfer.is_free(policy.device)
    return overlap == "on"


def may_be_followed(
    launched: Launched,
    batch: Sequence[RunningRequest],
    cache: Cache,
    drafters: Mapping[str, Drafter],
) -> bool:
    """Whether its plan can go on behind a step that is not read, for those of its requests that run."""
    plan = launched.step.plan
    if plan.kind is not PlanKind.PLAIN and not drafters[plan.drafter].can_overlap:
        return False
    if any(_keeps_turns(running, plan) for running in batch):
        return False
    # Rows behind the most that the step may commit: taken where they are free, never by sending anyone back.
    return cache.spare(plan.most_committed + plan.rows_per_forward) >= 0


def _keeps_turns(running: RunningRequest, plan: Plan) -> bool:
    """Whether a request ends with the step before for certain, or the host looks at its text between two."""
    if running.num_left <= plan.least_committed:
        return True
    text = running.text
    return text.goes_by_tokens if plan.num_drafts else text.is_edited_by_host
