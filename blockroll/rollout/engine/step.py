"""One decoding step of a batch: draft, verify, propose. Knows rows, laws and coins, but no queue and no end.

Two-forward drafts with a forward of its own, whose anchor row is causal: it settles the first position before
the others are verified behind the token that really stands there, so such a step commits two tokens at least.
A fused step verifies drafts that the step before proposed, and proposes the next ones in the same forward.

Law: with the target law, committed tokens follow the causal policy exactly, whatever the drafts are; with a
mixed law they follow the mixture of policy and draft rows, which is recorded with each token.

Shapes: B running requests, K drafted tokens, L = K + 1 verify rows, P proposals, W width, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockroll.errors import EmptySupport, NonFiniteLogits
from blockroll.policies.base import Policy
from blockroll.rollout.engine.cache import SlotCache
from blockroll.rollout.engine.running import Proposal, RunningRequest
from blockroll.rollout.engine.trace import EngineTimes
from blockroll.samplers import (
    Laws,
    join_verdicts,
    settle_first,
    step_uniforms,
    verify_block,
)
from blockroll.types import Draft, Plan, PlanKind, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A verdict and what it was made from; its cache rows are written, and not committed."""

    verdict: Verdict
    logits: tuple[Tensor, ...]  # float32, causal; the rows of one forward, or of two
    target_probs: tuple[Tensor, ...]  # of the same rows
    bad_targets_B: Tensor | None
    is_empty_BL: Tensor | None  # rows that nothing may follow
    states_BPLW: Tensor | None  # proposals of a fused forward
    parts: tuple[tuple[Draft, Verdict], ...]  # the verifications it came from, in order


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """What a step decided for each request, before any of it is a request's own."""

    draft: Draft
    verified: Verified
    policy_logprobs_BL: Tensor
    draft_uniforms_BK: Tensor
    verify_uniforms: Tensor  # (B, L), and one column more where the first position was settled
    attempts_B: Tensor
    origins: Sequence[tuple[int, int, int]]  # of the draft rows: context, first slot and masks
    failed: dict[int, tuple[int, str]]  # by slot: tokens before the first row that is wrong, and what is
    proposals: Sequence[Proposal | None]  # for what each request accepted; None: it has to start anew


class Decoder:
    """Runs the forwards and the sampler of a step on the slots of a cache, and counts their time."""

    def __init__(self, policy: Policy, cache: SlotCache, clock: Callable[[], float]) -> None:
        self.times = EngineTimes()
        self._policy = policy
        self._cache = cache
        self._clock = clock

    def decode(
        self, batch: Sequence[RunningRequest], plan: Plan, first_logits: Tensor | None = None
    ) -> Decoded:
        """Decode slots 0.. by a plan. All forwards are done then; what they gave is for the caller to commit.

        `first_logits` (B, K + 1, V) are the anchors' and the masks' rows of a batch whose prefill had both.
        """
        if plan.kind is PlanKind.FUSED:
            self._start_proposals(batch, plan, first_logits)
        device = self._policy.device
        state = torch.tensor([running.state for running in batch], device=device)
        anchors_B, seeds_B, attempts_B = state.unbind(dim=1)
        laws = Laws.of([running.text for running in batch], vocab_size=self._policy.vocab_size, device=device)
        positions_B = torch.tensor([running.num_tokens for running in batch], device=device)

        clock = self._clock()
        settles = plan.kind is PlanKind.TWO_FORWARD
        draft_uniforms_BK, verify_uniforms = step_uniforms(
            seeds_B, positions_B, attempts_B, plan.num_drafts, settles=settles
        )
        clock = self._charge("sampler_s", clock)
        draft_logits, num_drafts_B = self._draft_logits(batch, plan, anchors_B, first_logits)
        clock = self._charge("forward_s", clock)
        draft_logits, bad_drafts_B = _without_non_finite(draft_logits)
        draft_logits_BKV = draft_logits[:, 1:] if settles else draft_logits
        draft = laws.draw(draft_logits_BKV, draft_uniforms_BK, num_drafts_B)
        self._charge("sampler_s", clock)
        if settles:
            verified = self._settle_and_verify(draft_logits, draft, laws, verify_uniforms)
        else:
            verified = self._verify(plan, anchors_B, draft_logits, draft, laws, verify_uniforms, first_logits)

        clock = self._clock()
        policy_logprobs_BL = laws.policy_logprobs(verified.logits, verified.verdict)
        clock = self._charge("sampler_s", clock)
        proposals: Sequence[Proposal | None] = [None] * len(batch)
        if verified.states_BPLW is not None:
            proposals = self._proposals(batch, plan, verified.states_BPLW, verified.verdict)
            self._charge("forward_s", clock)
        return Decoded(
            draft=draft,
            verified=verified,
            policy_logprobs_BL=policy_logprobs_BL,
            draft_uniforms_BK=draft_uniforms_BK,
            verify_uniforms=verify_uniforms,
            attempts_B=attempts_B,
            origins=_origins(batch, plan),
            failed=_failures(bad_drafts_B, verified, laws.failed),
            proposals=proposals,
        )

    def _verify(
        self,
        plan: Plan,
        anchors_B: Tensor,
        draft_logits_BKV: Tensor,
        draft: Draft,
        laws: Laws,
        uniforms_BL: Tensor,
        first_logits: Tensor | None,
    ) -> Verified:
        """The anchor and all drafts in one forward, which a fused plan also lets propose."""
        clock = self._clock()
        ids_BL = torch.cat([anchors_B[:, None], draft.token_ids_BK], dim=1)
        window = self._cache.window(0, len(ids_BL), plan.rows_per_forward)
        states_BPLW = None
        if plan.kind is PlanKind.FUSED:
            fused = self._policy.fused_rows(ids_BL, plan.levels, window)
            logits_BLV, states_BPLW = fused.verify_logits_BLV, fused.proposal_states_BPLW
        elif first_logits is not None:
            logits_BLV = first_logits
        else:
            logits_BLV = self._policy.verify_logits(ids_BL, window)
        clock = self._charge("forward_s", clock)
        logits_BLV, bad_targets_B = _without_non_finite(logits_BLV)
        targets = laws.target_rows(logits_BLV, draft.token_ids_BK, draft_logits_BKV, draft.num_drafts_B)
        verdict = verify_block(draft, targets.probs_BLV, uniforms_BL)
        self._charge("sampler_s", clock)
        return Verified(
            verdict=verdict,
            logits=(logits_BLV,),
            target_probs=(targets.probs_BLV,),
            bad_targets_B=bad_targets_B,
            is_empty_BL=targets.is_empty_BL,
            states_BPLW=states_BPLW,
            parts=((draft, verdict),),
        )

    def _settle_and_verify(
        self, draft_logits: Tensor, draft: Draft, laws: Laws, uniforms: Tensor
    ) -> Verified:
        """The first position from the draft forward's own anchor row, the others behind what stands there.

        That row saw no mask: its keys stand before those of the others, and its logits are the first target
        row. No draft but the first decides what is settled, so the others are still draws from their recorded
        law.
        """
        clock = self._clock()
        size, num_drafts = len(draft_logits), draft_logits.shape[1] - 1
        anchor_logits_B1V, draft_logits_BKV = draft_logits[:, :1], draft_logits[:, 1:]
        first = laws.target_rows(
            anchor_logits_B1V, draft.token_ids_BK[:, :0], draft_logits_BKV[:, :1], draft.num_drafts_B
        )
        if first.is_empty_BL is not None:  # what is settled there is no token that the others may go by
            for slot in first.is_empty_BL[:, 0].nonzero().flatten().tolist():
                laws.failed.setdefault(slot, _EMPTY)
        settled = settle_first(draft, first.probs_BLV, uniforms[:, [0, -1]])
        rest = draft.behind_first()
        ids_BK = torch.cat([settled.token_ids_BL, rest.token_ids_BK], dim=1)
        clock = self._charge("sampler_s", clock)
        window = self._cache.window(0, size, num_drafts, num_pending=1)
        logits_BKV = self._policy.verify_logits(ids_BK, window)
        clock = self._charge("forward_s", clock)
        logits_BKV, bad_targets_B = _without_non_finite(logits_BKV)
        others = laws.target_rows(logits_BKV, ids_BK, draft_logits_BKV[:, 1:], rest.num_drafts_B)
        verified = verify_block(rest, others.probs_BLV, uniforms[:, 1 : num_drafts + 1])
        self._charge("sampler_s", clock)
        return Verified(
            verdict=join_verdicts(settled, verified),
            logits=(anchor_logits_B1V, logits_BKV),
            target_probs=(first.probs_BLV, others.probs_BLV),
            bad_targets_B=bad_targets_B,
            is_empty_BL=_joined(first.is_empty_BL, others.is_empty_BL, num_drafts),
            states_BPLW=None,
            parts=((draft, settled), (rest, verified)),
        )

    def _draft_logits(
        self, batch: Sequence[RunningRequest], plan: Plan, anchors_B: Tensor, first_logits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Draft rows, float32 (B, K, V), and how many of them each request has.

        From a draft forward they come behind the anchor's causal row: (B, K + 1, V).
        """
        device = self._policy.device
        if plan.kind is PlanKind.FUSED:
            proposals = [running.proposal for running in batch]
            rows = [proposal.logits_KV for proposal in proposals if proposal is not None]
            counts = [proposal.num_drafts for proposal in proposals if proposal is not None]
            return torch.stack(rows), torch.tensor(counts, device=device)
        num_drafts_B = torch.full((len(batch),), plan.num_drafts, device=device)
        if plan.num_drafts == 0:
            return torch.empty((len(batch), 0, self._policy.vocab_size), device=device), num_drafts_B
        if first_logits is not None:
            return first_logits, num_drafts_B
        window = self._cache.window(0, len(batch), plan.num_drafts + 1)
        return self._policy.draft_logits(anchors_B[:, None], plan.num_drafts, window), num_drafts_B

    def _start_proposals(
        self, batch: Sequence[RunningRequest], plan: Plan, first_logits: Tensor | None
    ) -> None:
        """A draft forward of their own for requests that no fused step has proposed for."""
        first = next((slot for slot, running in enumerate(batch) if running.proposal is None), None)
        if first is None:
            return
        clock = self._clock()
        num_drafts, late = plan.num_drafts, batch[first:]  # those that join lie behind the others
        if first_logits is None:
            anchors_B1 = torch.tensor([running.state[:1] for running in late], device=self._policy.device)
            window = self._cache.window(first, len(batch), num_drafts + 1)
            first_logits = self._policy.draft_logits(anchors_B1, num_drafts, window)
        for logits_KV, running in zip(first_logits[:, 1:], late, strict=True):
            if running.proposal is None:
                origin = (running.num_tokens, 0, num_drafts)
                running.start_proposal(Proposal(logits_KV=logits_KV, num_drafts=num_drafts, origin=origin))
        self.times.start_s += self._charge("forward_s", clock) - clock

    def _proposals(
        self, batch: Sequence[RunningRequest], plan: Plan, states_BPLW: Tensor, verdict: Verdict
    ) -> list[Proposal]:
        """The proposals made for what each request accepted.

        That is the one of the largest level p at or below the n accepted drafts. Its slot j stands p + 1 + j
        positions behind the old anchor, so slots n - p + 1 and up stand on those of the next drafts.
        """
        num_drafts, device = plan.num_drafts, self._policy.device
        levels_P = torch.tensor(plan.levels, device=device)
        accepted_B = verdict.num_accepted_B
        chosen_B = (levels_P <= accepted_B[:, None]).sum(dim=1) - 1
        shift_B = accepted_B - levels_P[chosen_B]
        slots_BK = (shift_B[:, None] + 1 + torch.arange(num_drafts, device=device)).clamp(max=num_drafts)
        rows_B1 = torch.arange(len(batch), device=device)[:, None]
        logits_BKV = self._policy.proposal_logits(states_BPLW[rows_B1, chosen_B[:, None], slots_BK])
        steps = zip(batch, logits_BKV, shift_B.tolist(), verdict.num_committed_B.tolist(), strict=True)
        return [
            Proposal(
                logits_KV=logits_KV,
                num_drafts=num_drafts - shift,
                # It knows all but the drafts past its level and the token that the verdict added.
                origin=(running.num_tokens + num_committed - shift - 1, shift + 1, num_drafts + 1),
            )
            for running, logits_KV, shift, num_committed in steps
        ]

    def _charge(self, part: str, since: float) -> float:
        now = self._clock()
        setattr(self.times, part, getattr(self.times, part) + now - since)
        return now


def _origins(batch: Sequence[RunningRequest], plan: Plan) -> list[tuple[int, int, int]]:
    """Where the draft rows of each request come from: context, first slot and masks."""
    if plan.kind is PlanKind.FUSED:
        return [running.proposal.origin for running in batch if running.proposal is not None]
    return [(running.num_tokens, 0, plan.num_drafts) if plan.num_drafts else (0, 0, 0) for running in batch]


def _without_non_finite(logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits fit for the sampler, and which requests held NaN or infinity (None if none did)."""
    # A sum is not finite if any entry is not: one pass clears them all.
    if math.isfinite(logits.sum().item()):
        return logits, None
    bad_B = ~torch.isfinite(logits).all(dim=(1, 2))
    if not bad_B.any():
        return logits, None
    return torch.where(bad_B[:, None, None], 0.0, logits), bad_B


def _joined(first_B1: Tensor | None, others_BK: Tensor | None, num_others: int) -> Tensor | None:
    """Flags of all rows, from those of the first and of the others; None stands for no flag."""
    if first_B1 is None and others_BK is None:
        return None
    if first_B1 is None:
        assert others_BK is not None
        first_B1 = torch.zeros_like(others_BK[:, :1])
    if others_BK is None:
        others_BK = torch.zeros_like(first_B1).expand(-1, num_others)
    return torch.cat([first_B1, others_BK], dim=1)


_EMPTY = f"{EmptySupport.__name__}: constraint, masks and logits processors leave no next token"


def _failures(
    bad_drafts_B: Tensor | None, verified: Verified, raised: Mapping[int, str]
) -> dict[int, tuple[int, str]]:
    """By slot, how many tokens stand before what went wrong, and what; `raised` is why rows may be empty."""
    failed = {}
    for name, bad_B in (("draft", bad_drafts_B), ("verify", verified.bad_targets_B)):
        for slot in [] if bad_B is None else bad_B.nonzero().flatten().tolist():
            failed[slot] = (0, f"{NonFiniteLogits.__name__}: {name} logits hold NaN or infinity")
    if verified.is_empty_BL is not None:
        # A row behind the last committed token decided nothing.
        offsets_L = torch.arange(verified.is_empty_BL.shape[1], device=verified.is_empty_BL.device)
        is_met_BL = verified.is_empty_BL & (offsets_L < verified.verdict.num_committed_B[:, None])
        for slot in is_met_BL.any(dim=1).nonzero().flatten().tolist():
            failed.setdefault(slot, (int(is_met_BL[slot].int().argmax()), raised.get(slot, _EMPTY)))
    return failed
