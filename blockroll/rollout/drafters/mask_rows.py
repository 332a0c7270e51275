"""Drafts from mask rows of the policy itself: in a forward of their own, or in the one that verifies.

Two-forward drafts stand behind the anchor's causal row, whose forward gives the first target row as well. A
fused step verifies the drafts that the step before proposed, and proposes the next ones, a block of masks for
each level: for so many accepted drafts.

Shapes: B running requests, K drafted tokens, P levels, W width, V vocabulary.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from blockroll.errors import InvalidInput
from blockroll.kernels.transfer import sent
from blockroll.policies.base import KVWindow, Policy
from blockroll.rollout.engine.drafting import NO_ORIGIN, Drafter, DraftRows, DraftStep, Verifying
from blockroll.rollout.engine.outcome import Outcome
from blockroll.rollout.engine.running import RunningRequest
from blockroll.types import MASK_ROWS, Plan, PlanKind, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposals:
    """Those of a batch, as the device knows them."""

    logits_BKV: Tensor
    num_drafts_B: Tensor  # int64


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """The draft rows that a fused step leaves for the next one."""

    logits_KV: Tensor  # float32; rows behind `num_drafts` hold no meaning
    num_drafts: int
    level: int | None  # accepted drafts that it assumes; None: it came from a draft forward
    origin: tuple[int, int, int]  # tokens of the text its rows know, slot of the first, masks in the block


class MaskRows(Drafter):
    """Mask tokens draft a block; the law is the softmax of their rows, as each request samples drafts."""

    name = MASK_ROWS
    can_overlap = True

    def check(self, plan: Plan, policy: Policy) -> None:
        """Refuse a policy without masks; warn of more drafts than it was trained for, or another layout."""
        if not policy.can_draft:
            raise InvalidInput(
                f"plan {plan.name} needs a policy that drafts, and this one has neither a draft adapter nor "
                "a mask token; use 'plain' or 'history(K)', or make an adapter with `blockroll convert`"
            )
        if plan.num_drafts > policy.trained_drafts:
            warnings.warn(
                f"plan {plan.name} drafts more than the {policy.trained_drafts} tokens this policy was "
                "trained for; the law stays exact, the later drafts will rarely be accepted",
                stacklevel=2,
            )
        elif plan.layout not in policy.trained_layouts:
            warnings.warn(
                f"plan {plan.name} drafts in a layout this policy was not trained for, only for "
                f"{', '.join(policy.trained_layouts) or 'none'}; the law stays exact, fewer drafts are "
                "accepted",
                stacklevel=2,
            )

    def num_masks_at_start(self, plan: Plan) -> int | None:
        """The drafts of the first step: the prefill's forward is then the draft forward as well."""
        return plan.num_drafts

    def start(self, step: DraftStep) -> bool:
        """Under a fused plan, a draft forward for requests that no fused step has proposed for."""
        if step.plan.kind is not PlanKind.FUSED:
            return False
        batch, num_drafts, rows = step.batch, step.plan.num_drafts, step.first_logits
        first = next((slot for slot, running in enumerate(batch) if _proposal(running) is None), None)
        if first is None:
            return False
        late = batch[first:]  # those that join lie behind the others
        if rows is None:
            window = step.window(num_drafts + 1, first=first)
            rows = step.policy.draft_logits(step.anchors(first), num_drafts, window)
        else:
            rows = rows[first:]
        for logits_KV, running in zip(rows[:, 1:], late, strict=True):
            if _proposal(running) is None:
                origin = (running.num_tokens, 0, num_drafts)
                running.start_proposal(
                    Proposal(logits_KV=logits_KV, num_drafts=num_drafts, level=None, origin=origin)
                )
        return True

    def propose(self, step: DraftStep) -> DraftRows:
        """The rows that the step before has proposed, or those of a draft forward."""
        device, num_drafts, behind = step.policy.device, step.plan.num_drafts, step.behind
        if behind is not None and isinstance(behind.left, Proposals):
            return DraftRows(
                logits=behind.left.logits_BKV[behind.rows_B],
                num_drafts_B=behind.left.num_drafts_B[behind.rows_B],
                origins=[NO_ORIGIN] * len(step.batch),
            )
        if step.plan.kind is PlanKind.FUSED:
            held = [_proposal(running) for running in step.batch]
            proposals = [proposal for proposal in held if proposal is not None]
            counts = [proposal.num_drafts for proposal in proposals]
            return DraftRows(
                logits=torch.stack([proposal.logits_KV for proposal in proposals]),
                num_drafts_B=sent(counts, device),
                origins=[proposal.origin for proposal in proposals],
                num_drafts=counts,
            )
        rows = step.first_logits
        if rows is None:
            window = step.window(num_drafts + 1)
            rows = step.policy.draft_logits(step.anchors(), num_drafts, window)
        return DraftRows(
            logits=rows,
            num_drafts_B=torch.full((len(step.batch),), num_drafts, device=device),
            origins=[
                (running.num_tokens, 0, num_drafts) if behind is None else NO_ORIGIN for running in step.batch
            ],
            num_drafts=[num_drafts] * len(step.batch),
        )

    def verify(self, step: DraftStep, ids_BL: Tensor, window: KVWindow) -> Verifying:
        """Fused, with the states of a proposal for each level left over."""
        fused = step.policy.fused_rows(ids_BL, step.plan.levels, window)
        return Verifying(logits_BLV=fused.verify_logits_BLV, leftover=fused.proposal_states_BPLW)

    def leave(self, step: DraftStep, leftover: object, verdict: Verdict) -> Proposals | None:
        """The proposals made for what each request accepted.

        That is the one of the largest level p at or below the n accepted drafts. Its slot j stands p + 1 + j
        positions behind the old anchor, so slots n - p + 1 and up stand on those of the next drafts.
        """
        if step.plan.kind is not PlanKind.FUSED:
            return None
        assert isinstance(leftover, Tensor), "states (B, P, L, W) of a fused forward"
        num_drafts, device = step.plan.num_drafts, step.policy.device
        levels_P = _levels(step.plan.levels, device)
        accepted_B = verdict.num_accepted_B
        chosen_B = (levels_P <= accepted_B[:, None]).sum(dim=1) - 1
        shift_B = accepted_B - levels_P[chosen_B]
        slots_BK = (shift_B[:, None] + 1 + torch.arange(num_drafts, device=device)).clamp(max=num_drafts)
        rows_B1 = torch.arange(len(step.batch), device=device)[:, None]
        logits_BKV = step.policy.proposal_logits(leftover[rows_B1, chosen_B[:, None], slots_BK])
        return Proposals(logits_BKV=logits_BKV, num_drafts_B=num_drafts - shift_B)

    def levels(self, step: DraftStep) -> Sequence[int | None]:
        """Of a fused step's; what such a step has left is not what another plan verifies."""
        if step.plan.kind is not PlanKind.FUSED:
            return super().levels(step)
        proposals = [_proposal(running) for running in step.batch]
        return [proposal.level if proposal is not None else None for proposal in proposals]

    def keep(self, step: DraftStep, left: object, outcome: Outcome) -> Sequence[Proposal | None]:
        """The same, each its request's own."""
        if not isinstance(left, Proposals):
            return [None] * len(step.batch)
        num_drafts = step.plan.num_drafts
        levels = [
            max(level for level in step.plan.levels if level <= accepted) for accepted in outcome.num_accepted
        ]
        shifts = [accepted - level for accepted, level in zip(outcome.num_accepted, levels, strict=True)]
        rows = zip(step.batch, left.logits_BKV, levels, shifts, outcome.num_committed, strict=True)
        return [
            Proposal(
                logits_KV=logits_KV,
                num_drafts=num_drafts - shift,
                level=level,
                # It knows all but the drafts past its level and the token that the verdict added.
                origin=(running.num_tokens + num_committed - shift - 1, shift + 1, num_drafts + 1),
            )
            for running, logits_KV, level, shift, num_committed in rows
        ]


@lru_cache(maxsize=64)
def _levels(levels: tuple[int, ...], device: torch.device) -> Tensor:
    """Sent there once."""
    return torch.tensor(levels, device=device)


def _proposal(running: RunningRequest) -> Proposal | None:
    """What a fused step left for this request; another drafter's is none."""
    return running.proposal if isinstance(running.proposal, Proposal) else None
