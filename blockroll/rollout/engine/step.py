"""One decoding step of a batch: draft, verify, propose. Knows rows, laws and coins, but no queue and no end.

Two-forward drafts with a forward of its own, whose anchor row is causal: it settles the first position before
the others are verified behind the token that really stands there, so such a step commits two tokens at least.
A fused step verifies drafts that the step before proposed, and proposes the next ones in the same forward.

Law: with the target law, committed tokens follow the causal policy exactly, whatever the drafts are; with a
mixed law they follow the mixture of policy and draft rows, which is recorded with each token. Where drafts
are point masses, and where there are none, tokens are drawn by the coins of their positions: with the target
law the text is then that of plain decoding, token for token.

Shapes: B running requests, K drafted tokens, L = K + 1 verify rows, P proposals, W width, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from blockroll.kernels.block_verify import join_verdicts, settle_first, verify_block
from blockroll.kernels.choice import is_triton
from blockroll.kernels.philox import Uniforms, beside, drawn, either
from blockroll.kernels.rows import Logits, without_non_finite
from blockroll.policies.base import Policy
from blockroll.rollout.engine.cache.contract import Cache
from blockroll.rollout.engine.drafted import (
    check_drafted,
    check_kept,
    check_values,
    check_verifying,
    fitted,
)
from blockroll.rollout.engine.drafting import NO_ORIGIN, Drafter, DraftRows, DraftStep
from blockroll.rollout.engine.launched import Beginning, Decoded, Launched, Record, Verified
from blockroll.rollout.engine.outcome import EMPTY, Flags, Unread
from blockroll.rollout.engine.ragged import packing_of
from blockroll.rollout.engine.running import RunningRequest
from blockroll.rollout.engine.trace import EngineTimes, ForwardRows
from blockroll.samplers import Laws, step_coins, step_uniforms
from blockroll.types import POINT_MASS, Draft, Plan, PlanKind, RowFault


class Decoder:
    """Runs the forwards and the sampler of a step on the slots of a cache, and counts their time."""

    def __init__(
        self,
        policy: Policy,
        cache: Cache,
        drafters: Mapping[str, Drafter],
        clock: Callable[[], float],
    ) -> None:
        """`drafters`, by their names, are those of every plan that a step may have."""
        self.times = EngineTimes()
        self._drafters = drafters
        self._policy = policy
        self._cache = cache
        self._clock = clock

    def num_masks_at_start(self, plan: Plan) -> int | None:
        """Masks that the prefill of a whole batch should bring along, 0 for anchors alone; None: nothing."""
        if plan.kind is PlanKind.PLAIN:
            return 0
        return self._drafters[plan.drafter].num_masks_at_start(plan)

    def launch(
        self,
        batch: Sequence[RunningRequest],
        plan: Plan,
        first_logits: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        *,
        behind: Launched | None = None,
        is_observed: bool = False,
    ) -> Launched:
        """Queue all of a step of slots 0.. by a plan; what it decides is on its way then.

        `first_logits` (B, K + 1, V) are the anchors' and the masks' rows of a batch whose prefill had both;
        `lengths` the most drafts of each request. `behind` is a step of the same plan that has all these
        requests and is not read: `overlap.py` says which may have another one behind them. `is_observed`
        keeps what a trace of it is made of, until it is read.
        """
        device, vocab_size = self._policy.device, self._policy.vocab_size
        step = DraftStep(
            plan=plan,
            batch=batch,
            policy=self._policy,
            cache=self._cache,
            first_logits=first_logits,
            lengths=lengths,
        )
        clock = self._clock()
        drafter = None if plan.kind is PlanKind.PLAIN else self._drafters[plan.drafter]
        if drafter is not None and behind is None and drafter.start(step):
            self.times.start_s += self._charge("forward_s", clock) - clock
        begin = Beginning.of(batch, device, behind)
        step = replace(step, anchors_B=begin.anchors_B, behind=begin.behind)
        laws = Laws.of([running.text for running in batch], vocab_size=vocab_size, device=device)

        clock = self._clock()
        settles = plan.settles_first
        given = drafted = self._draft(step)
        is_invalid_B = None
        if plan.kind is not PlanKind.PLAIN:
            is_invalid_B = check_drafted(given, plan, batch_size=len(batch), vocab_size=vocab_size)
            if is_invalid_B is not None:
                drafted = fitted(given, vocab_size=vocab_size)
        clock = self._charge("forward_s", clock)
        by_position = drafted.is_certain if isinstance(drafted, Draft) else laws.certain_draft
        draft_uniforms_BK, verify_uniforms = (step_coins if is_triton() else step_uniforms)(
            begin.seeds_B,
            begin.positions_B,
            begin.attempts_B,
            plan.num_drafts,
            settles=settles,
            by_position=by_position,
        )
        draft, draft_rows, bad_drafts_B = self._drawn(drafted, laws, draft_uniforms_BK, settles=settles)
        draft_uniforms_BK, verify_uniforms = _of_width(
            draft.token_ids_BK.shape[1], draft_uniforms_BK, verify_uniforms, by_position=by_position
        )
        self._charge("sampler_s", clock)
        if settles:
            assert draft_rows is not None, "a two-forward plan drafts by rows behind the anchor's"
            verified = self._settle_and_verify(step, draft_rows, draft, laws, verify_uniforms)
        else:
            verified = self._verify(step, begin.between_BN, draft_rows, draft, laws, verify_uniforms)

        clock = self._clock()
        policy_logprobs_BL = laws.policy_logprobs(verified.logits, verified.verdict)
        flags = Flags(
            drafts_B=_or(bad_drafts_B, verified.bad_anchors_B),
            targets_B=verified.bad_targets_B,
            is_empty_BL=verified.is_empty_BL,
            is_invalid_B=is_invalid_B,
        )
        outcome = Unread(draft, verified.verdict, policy_logprobs_BL, flags, laws.failed)
        clock = self._charge("sampler_s", clock)
        left = None
        if drafter is not None:
            left = drafter.leave(step, verified.leftover, verified.verdict)
            self._charge("forward_s", clock)
        record = None
        if is_observed:
            record = Record(
                draft=draft,
                verified=verified,
                policy_logprobs_BL=policy_logprobs_BL,
                draft_uniforms_BK=drawn(draft_uniforms_BK),
                verify_uniforms=drawn(verify_uniforms),
                attempts_B=begin.attempts_B,
                origins=[NO_ORIGIN] * len(batch) if isinstance(drafted, Draft) else drafted.origins,
            )
        if isinstance(given, DraftRows):
            given = replace(given, logits=given.logits.new_empty(0))
        return Launched(
            step=replace(step, first_logits=None, behind=None),
            given=given,
            verdict=replace(verified.verdict, evidence=None),
            outcome=outcome,
            left=left,
            record=record,
        )

    def read(self, launched: Launched) -> Decoded:
        """Wait for what a step has decided. All its forwards are done then; to commit is for the caller."""
        clock = self._clock()
        outcome = launched.outcome.read()
        clock = self._charge("wait_s", clock)
        step = launched.step
        if outcome.is_invalid:
            check_values(launched.given, step.plan, vocab_size=self._policy.vocab_size)
        proposals: Sequence[object | None] = [None] * len(step.batch)
        levels: Sequence[int | None] = [None] * len(step.batch)
        if step.plan.kind is not PlanKind.PLAIN:
            drafter = self._drafters[step.plan.drafter]
            levels = drafter.levels(step)
            proposals = drafter.keep(step, launched.left, outcome)
            check_kept(proposals, step.plan, batch_size=len(step.batch))
            self._charge("forward_s", clock)
        return Decoded(launched=launched, outcome=outcome, levels=levels, proposals=proposals)

    def _verify(
        self,
        step: DraftStep,
        between_BN: Tensor,
        draft_logits_BKV: Tensor | None,
        draft: Draft,
        laws: Laws,
        uniforms_BL: Uniforms,
    ) -> Verified:
        """The anchor and all drafts in one forward, in which the drafter may draft as well."""
        clock = self._clock()
        ids_BL = torch.cat([step.anchors(), draft.token_ids_BK], dim=1)
        size, width = ids_BL.shape
        num_rows, packing = width, None
        match step.plan.kind:
            case PlanKind.FUSED:
                num_rows = step.plan.rows_per_forward
            case PlanKind.ONE_FORWARD:
                packing = packing_of(draft, width, self._policy)
        window = step.window(num_rows) if packing is None else self._cache.packed_window(0, packing)
        leftover = None
        if step.plan.kind is not PlanKind.PLAIN:
            verifying = self._drafters[step.plan.drafter].verify(step, ids_BL, window)
            check_verifying(
                verifying, step.plan, batch_size=size, num_rows=width, vocab_size=self._policy.vocab_size
            )
            logits_BLV, leftover = verifying.logits_BLV, verifying.leftover
        elif step.first_logits is not None:
            logits_BLV = step.first_logits
        else:
            logits_BLV = self._policy.verify_logits(ids_BL, window)
        clock = self._charge("forward_s", clock)
        logits_BLV, bad_targets_B = _fit(logits_BLV, laws)
        behind_BN = torch.cat([between_BN, draft.token_ids_BK], dim=1)
        targets = laws.target_rows(logits_BLV, behind_BN, draft_logits_BKV, draft.num_drafts_B)
        verdict = verify_block(draft, targets.law, uniforms_BL)
        self._charge("sampler_s", clock)
        return Verified(
            verdict=verdict,
            logits=(logits_BLV,),
            targets=(targets.law,),
            bad_targets_B=_or(bad_targets_B, _not_finite(verdict.faults_BL)),
            is_empty_BL=_or(targets.is_empty_BL, _empty(verdict.faults_BL)),
            leftover=leftover,
            parts=((draft, verdict),),
            forward_rows=ForwardRows(
                size, num_rows, size * num_rows if packing is None else sum(packing.num_rows)
            ),
        )

    def _settle_and_verify(
        self, step: DraftStep, draft_logits: Tensor, draft: Draft, laws: Laws, uniforms: Uniforms
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
        if first.is_empty_BL is not None:
            laws.note_empty(first.is_empty_BL[:, 0], EMPTY)
        settled = settle_first(draft, first.law, uniforms[:, [0, -1]])
        rest = draft.behind_first()
        ids_BK = torch.cat([settled.token_ids_BL, rest.token_ids_BK], dim=1)
        clock = self._charge("sampler_s", clock)
        window = step.window(num_drafts, num_pending=1)
        logits_BKV = self._policy.verify_logits(ids_BK, window)
        clock = self._charge("forward_s", clock)
        finite_BKV, bad_targets_B = _fit(logits_BKV, laws)
        others = laws.target_rows(finite_BKV, ids_BK, draft_logits_BKV[:, 1:], rest.num_drafts_B)
        verified = verify_block(rest, others.law, uniforms[:, 1 : num_drafts + 1])
        self._charge("sampler_s", clock)
        verdict = join_verdicts(settled, verified)
        is_empty_BL = _joined(first.is_empty_BL, others.is_empty_BL, num_drafts)
        return Verified(
            verdict=verdict,
            logits=(anchor_logits_B1V, finite_BKV),
            targets=(first.law, others.law),
            bad_targets_B=_or(bad_targets_B, _not_finite(verified.faults_BL)),
            bad_anchors_B=_not_finite(settled.faults_BL),
            is_empty_BL=_or(is_empty_BL, _empty(verdict.faults_BL)),
            leftover=None,
            parts=((draft, settled), (rest, verified)),
            forward_rows=ForwardRows(size, num_drafts, size * num_drafts),
        )

    def _draft(self, step: DraftStep) -> DraftRows | Draft:
        """What the plan's drafter proposes; of a plain plan, nothing."""
        if step.plan.kind is not PlanKind.PLAIN:
            return self._drafters[step.plan.drafter].propose(step)
        no_tokens_B0 = torch.empty((len(step.batch), 0), dtype=torch.int64, device=self._policy.device)
        return Draft(token_ids_BK=no_tokens_B0, law=POINT_MASS, num_drafts_B=no_tokens_B0.sum(dim=1))

    def _drawn(
        self, drafted: DraftRows | Draft, laws: Laws, uniforms_BK: Uniforms, *, settles: bool
    ) -> tuple[Draft, Tensor | None, Tensor | None]:
        """Drafts, the rows they were drawn from if they come from rows, and which requests' rows were bad."""
        if isinstance(drafted, Draft):
            return drafted, None, None
        rows, bad_B = _fit(drafted.logits, laws)
        assert isinstance(rows, Tensor), "draft rows are no packed ones"
        draft = laws.draw(rows[:, 1:] if settles else rows, uniforms_BK, drafted.num_drafts_B)
        return draft, rows, _or(bad_B, _not_finite(draft.faults_BK))

    def _charge(self, part: str, since: float) -> float:
        now = self._clock()
        setattr(self.times, part, getattr(self.times, part) + now - since)
        return now


def _of_width(
    num_drafts: int, draft_BK: Uniforms, verify: Uniforms, *, by_position: Tensor | bool
) -> tuple[Uniforms, Uniforms]:
    """The uniforms of a step with so many drafts, of those that its plan may have.

    The first ones; but the one that draws the token behind the drafts stays where no position says which.
    """
    if num_drafts == draft_BK.shape[1]:
        return draft_BK, verify
    first, last = verify[:, : num_drafts + 1], verify[:, draft_BK.shape[1] :]
    with_last = beside(verify[:, :num_drafts], last)
    if isinstance(by_position, Tensor):
        return draft_BK[:, :num_drafts], either(by_position, first, with_last)
    return draft_BK[:, :num_drafts], first if by_position else with_last


def _fit(logits_BLV: Logits, laws: Laws) -> tuple[Logits, Tensor | None]:
    """Logits fit for the sampler, and which requests held NaN or infinity; None: none, or it is told later.

    Kernels tell it of the rows that they read.
    """
    if is_triton() and not laws.edits_rows:
        return logits_BLV, None
    return without_non_finite(logits_BLV)


def _not_finite(faults_BL: Tensor | None) -> Tensor | None:
    return None if faults_BL is None else (faults_BL == RowFault.NOT_FINITE).any(dim=1)


def _empty(faults_BL: Tensor | None) -> Tensor | None:
    return None if faults_BL is None else faults_BL == RowFault.EMPTY


def _or(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Flags of both; None stands for no flag."""
    if one is None or other is None:
        return other if one is None else one
    return one | other


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
