"""One engine: continuous batching of requests under one decoding plan, or one chosen for each step.

A step is: admit waiting requests and prefill them, draft (if the plan drafts), verify, commit. Two-forward
drafts with a forward of its own, whose anchor row is causal: it settles the first position before the others
are verified behind the token that really stands there, so such a step commits two tokens at least. A fused
step verifies drafts that the step before proposed, and proposes the next ones in the same forward. A planner
is asked before each step and told what the step took and committed. The engine owns the cache and the
per-request state; it knows neither processes nor weights' origins.

Law: with the target law, committed tokens follow the causal policy exactly, whatever the drafts are; with a
mixed law they follow the mixture of policy and draft rows, which is recorded with each token.

Shapes: B running requests, K drafted tokens, L = K + 1 verify rows, V vocabulary.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from blockroll.errors import EmptySupport, InvalidInput, NonFiniteLogits
from blockroll.policies.base import Policy
from blockroll.rollout.audit import AuditedStep, AuditWriter
from blockroll.rollout.cache import ROW_STEP, SlotCache
from blockroll.rollout.planner import Planner
from blockroll.rollout.prefill import prefill
from blockroll.rollout.requests import Limits, check_request
from blockroll.rollout.running import Proposal, RunningRequest, StopRule
from blockroll.rollout.scheduler import Scheduler
from blockroll.samplers import (
    Laws,
    join_verdicts,
    settle_first,
    step_uniforms,
    verify_block,
)
from blockroll.types import Commit, Draft, Guide, Plan, Request, Rollout, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """Everything the sampler saw and decided in one step; rows follow `request_ids`."""

    request_ids: tuple[str, ...]
    draft: Draft
    target_probs_BLV: Tensor
    draft_uniforms_BK: Tensor
    verify_uniforms_BL: Tensor
    settle_uniforms_B: Tensor | None  # None: the first position was verified with the others
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step made final."""

    commits: tuple[Commit, ...]
    finished: tuple[Rollout, ...]


@dataclass(slots=True)
class EngineTimes:
    """Seconds spent since the last reset, prefill excluded; host time is step minus forward and sampler."""

    num_steps: int = 0
    step_s: float = 0.0
    forward_s: float = 0.0
    start_s: float = 0.0  # of forward_s: first proposals of a fused plan
    sampler_s: float = 0.0

    @property
    def host_s(self) -> float:
        """Everything but the policy forward and the sampler."""
        return self.step_s - self.forward_s - self.sampler_s


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verified:
    """A verdict and what it was made from; the cache rows it keeps are committed."""

    verdict: Verdict
    logits: tuple[Tensor, ...]  # float32, causal; the rows of one forward, or of two
    target_probs: tuple[Tensor, ...]  # of the same rows
    bad_targets_B: Tensor | None
    is_empty_BL: Tensor | None  # rows that nothing may follow
    states_BPLW: Tensor | None  # proposals of a fused forward
    parts: tuple[tuple[Draft, Verdict], ...]  # the verifications it came from, in order


class Engine:
    """Decodes requests with one policy, one plan a step for all. Not thread-safe: one caller at a time."""

    def __init__(
        self,
        policy: Policy,
        *,
        plan: Plan | Planner,
        max_batch_size: int = 64,
        max_length: int = 0,
        max_cache_rows: int = 0,
        decode: Callable[[list[int]], str] | None = None,
        policy_version: int = 0,
        observer: Callable[[StepRecord], None] | None = None,
        audit: AuditWriter | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`max_length` 0 is what the policy was built for; `decode` is needed for stop strings only.

        The cache has room for the longest text that the requests at hand can become. `max_cache_rows` bounds
        its rows over all slots: then fewer than `max_batch_size` requests run together. 0: no bound.
        """
        self.planner = None if isinstance(plan, Plan) else plan
        plans = (plan,) if isinstance(plan, Plan) else plan.candidates
        for each in plans:
            check_plan(each, policy)
        if max_length > policy.max_length:
            raise InvalidInput(
                f"max_length is {max_length}, but the policy was built for {policy.max_length} positions"
            )
        self.policy = policy
        self.plan = plans[0]  # of the latest step
        self.policy_version = policy_version
        self.times = EngineTimes()
        self.limits = Limits(
            vocab_size=policy.vocab_size,
            max_length=max_length or policy.max_length,
            mask_token_id=policy.mask_token_id,
        )
        self._scheduler = Scheduler(max_batch_size=max_batch_size)
        self._max_batch_size, self._max_cache_rows = max_batch_size, max_cache_rows
        self._block_rows = max(each.rows_per_forward for each in plans)
        self._cache = SlotCache(num_slots=0, capacity=0, device=policy.device)
        self._rows_per_slot = 0  # that the cache has once the requests at hand have joined
        self._requests: dict[str, RunningRequest] = {}
        self._decode = decode
        self._observer = observer
        self.audit = audit
        self._clock = clock

    @property
    def num_requests(self) -> int:
        """Requests waiting and running."""
        return len(self._requests)

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests; all of them are checked before the first is queued."""
        requests = tuple(requests)
        taken = set(self._requests)
        for request in requests:
            check_request(request, self.limits)
            if request.sampling.stop and self._decode is None:
                raise InvalidInput(
                    f"request {request.request_id!r} has stop strings, but the engine has no tokenizer"
                )
            if request.request_id in taken:
                raise InvalidInput(
                    f"request id {request.request_id!r} is already being served; ids must be unique"
                )
            taken.add(request.request_id)
        joining = [
            RunningRequest(request, self._stop_rule(request), self._guide(request)) for request in requests
        ]
        self._make_room(requests)
        for request, running in zip(requests, joining, strict=True):
            self._requests[request.request_id] = running
            self._scheduler.submit(request.request_id, len(running.cached_ids))

    def abort(self, request_ids: Iterable[str]) -> tuple[Rollout, ...]:
        """End requests now; what each had committed comes back with finish reason `abort`."""
        aborted = []
        for request_id in request_ids:
            running = self._requests.pop(request_id, None)
            if running is None:
                continue
            if not self._scheduler.drop_waiting(request_id):
                self._release(self._scheduler.running.index(request_id), running.cached_ids)
            aborted.append(running.rollout("abort"))
        return tuple(aborted)

    def release_memory(self) -> None:
        """Give the cache's memory back while nothing runs; the next request takes it again."""
        if self._requests:
            raise InvalidInput(f"{self.num_requests} requests are being served: their cache is in use")
        self._cache.release()
        self._rows_per_slot = 0

    def recompute_cache(self) -> None:
        """The policy's weights have changed: rebuild the keys and values of what runs, forget all others."""
        self._cache.forget()
        running = [self._requests[request_id] for request_id in self._scheduler.running]
        if running:
            self._prefill(0, running)

    def _make_room(self, requests: Iterable[Request]) -> None:
        """Plan the cache for requests that join, or refuse them. What runs is never driven out."""
        lengths = [len(request.prompt_ids) + request.sampling.max_tokens for request in requests]
        longest = min(max(lengths, default=0), self.limits.max_length)
        rows = max(-(-(longest + self._block_rows) // ROW_STEP) * ROW_STEP, self._rows_per_slot)
        num_slots = self._max_batch_size
        if self._max_cache_rows:
            num_slots = min(num_slots, self._max_cache_rows // rows)
            if num_slots == 0:
                raise InvalidInput(
                    f"a text of {longest} tokens needs {rows} rows of keys and values, but the cache may "
                    f"have {self._max_cache_rows} over all slots; give it more memory (memory_fraction), or "
                    "shorten prompts or max_tokens"
                )
        self._scheduler.max_batch_size = max(num_slots, len(self._scheduler.running))
        self._rows_per_slot = rows

    def step(self) -> StepResult:
        """Decode one step for every running request; joins waiting requests first."""
        admitted = self._scheduler.admit()
        if admitted:
            num_running = len(self._scheduler.running)
            # Growing copies the cache, so it grows by powers of two.
            num_slots = max(1 << (num_running - 1).bit_length(), self._cache.num_slots)
            self._cache.reserve(
                num_slots=min(num_slots, self._scheduler.max_batch_size), capacity=self._rows_per_slot
            )
            start = num_running - len(admitted)
            self._prefill(start, [self._requests[request_id] for request_id in admitted])
        batch = [self._requests[request_id] for request_id in self._scheduler.running]
        if not batch:
            return StepResult(commits=(), finished=())
        started, start_s = self._clock(), self.times.start_s
        context = 0
        if self.planner is not None:
            context = max(running.num_tokens for running in batch)
            self._change_plan(self.planner.choose(len(batch), context), batch)
        result = self._decode_step(batch)
        seconds = self._clock() - started
        self.times.step_s += seconds
        self.times.num_steps += 1
        if self.planner is not None:
            num_tokens = sum(len(commit.token_ids) for commit in result.commits)
            self.planner.observe(
                self.plan,
                len(batch),
                context,
                seconds,
                num_tokens,
                start_seconds=self.times.start_s - start_s,
            )
        return result

    def _change_plan(self, plan: Plan, batch: list[RunningRequest]) -> None:
        """Decode by this plan from now on; proposals of another number of drafts would not fit it."""
        if plan.num_drafts != self.plan.num_drafts:
            for running in batch:
                running.proposal = None
        self.plan = plan

    def _decode_step(self, batch: list[RunningRequest]) -> StepResult:
        plan, size = self.plan, len(batch)
        if plan.levels:
            self._start_proposals(batch)
        state = torch.tensor([running.state for running in batch], device=self.policy.device)
        anchors_B, seeds_B, attempts_B = state.unbind(dim=1)
        laws = Laws.of(
            [running.text for running in batch],
            vocab_size=self.policy.vocab_size,
            device=self.policy.device,
        )
        positions_B = self._cache.lengths_N[:size] + 1

        clock = self._clock()
        settles = plan.num_drafts > 0 and not plan.levels
        draft_uniforms_BK, verify_uniforms = step_uniforms(
            seeds_B, positions_B, attempts_B, plan.num_drafts, settles=settles
        )
        clock = self._charge("sampler_s", clock)
        draft_logits, num_drafts_B = self._draft_logits(batch, anchors_B)
        clock = self._charge("forward_s", clock)
        draft_logits, bad_drafts_B = _without_non_finite(draft_logits)
        draft_logits_BKV = draft_logits[:, 1:] if settles else draft_logits
        draft = laws.draw(draft_logits_BKV, draft_uniforms_BK, num_drafts_B)
        self._charge("sampler_s", clock)
        if settles:
            verified = self._settle_and_verify(draft_logits, draft, laws, verify_uniforms)
        else:
            verified = self._verify(anchors_B, draft_logits, draft, laws, verify_uniforms)
        verdict = verified.verdict

        clock = self._clock()
        policy_logprobs_BL = laws.policy_logprobs(verified.logits, verdict)
        self._charge("sampler_s", clock)
        if self._observer is not None:
            self._observer(
                StepRecord(
                    request_ids=self._scheduler.running,
                    draft=draft,
                    target_probs_BLV=torch.cat(verified.target_probs, dim=1),
                    draft_uniforms_BK=draft_uniforms_BK,
                    verify_uniforms_BL=verify_uniforms[:, : plan.num_drafts + 1],
                    settle_uniforms_B=verify_uniforms[:, -1] if settles else None,
                    verdict=verdict,
                )
            )
        failed = _failures(bad_drafts_B, verified)
        before = self._audited(batch) if self.audit is not None else None
        result = self._commit(batch, num_drafts_B.tolist(), verdict, policy_logprobs_BL, failed)
        if self.audit is not None and before is not None:
            num_before, origins = before
            self.audit.record(
                AuditedStep(
                    requests=[running.request for running in batch],
                    plan=plan,
                    version=self.policy_version,
                    attempts_B=attempts_B,
                    num_before=num_before,
                    num_kept=[running.num_tokens - n for running, n in zip(batch, num_before, strict=True)],
                    origins=origins,
                    parts=verified.parts,
                    policy_logprobs_BL=policy_logprobs_BL,
                )
            )
            if not self._requests:
                self.audit.flush(is_idle=True)
        if verified.states_BPLW is not None:
            self._keep_proposals(batch, verified.states_BPLW, verdict.num_accepted_B)
        return result

    def _verify(
        self, anchors_B: Tensor, draft_logits_BKV: Tensor, draft: Draft, laws: Laws, uniforms_BL: Tensor
    ) -> _Verified:
        """The anchor and all drafts in one forward, which a fused plan also lets propose."""
        clock = self._clock()
        ids_BL = torch.cat([anchors_B[:, None], draft.token_ids_BK], dim=1)
        window = self._cache.window(0, len(ids_BL), self.plan.rows_per_forward)
        states_BPLW = None
        if self.plan.levels:
            fused = self.policy.fused_rows(ids_BL, self.plan.levels, window)
            logits_BLV, states_BPLW = fused.verify_logits_BLV, fused.proposal_states_BPLW
        else:
            logits_BLV = self.policy.verify_logits(ids_BL, window)
        clock = self._charge("forward_s", clock)
        logits_BLV, bad_targets_B = _without_non_finite(logits_BLV)
        targets = laws.target_rows(logits_BLV, draft.token_ids_BK, draft_logits_BKV, draft.num_drafts_B)
        verdict = verify_block(draft, targets.probs_BLV, uniforms_BL)
        self._charge("sampler_s", clock)
        self._cache.commit(0, len(ids_BL), verdict.num_committed_B)
        return _Verified(
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
    ) -> _Verified:
        """The first position from the draft forward's own anchor row, the others behind what stands there.

        That row saw no mask: its keys stay in the cache, and its logits are the first target row. No draft
        but the first decides what is settled, so the others are still draws from their recorded law.
        """
        clock = self._clock()
        size, num_drafts = len(draft_logits), self.plan.num_drafts
        anchor_logits_B1V, draft_logits_BKV = draft_logits[:, :1], draft_logits[:, 1:]
        first = laws.target_rows(
            anchor_logits_B1V, draft.token_ids_BK[:, :0], draft_logits_BKV[:, :1], draft.num_drafts_B
        )
        settled = settle_first(draft, first.probs_BLV, uniforms[:, [0, -1]])
        self._cache.commit(0, size, settled.num_committed_B)
        rest = Draft(
            token_ids_BK=draft.token_ids_BK[:, 1:],
            probs_BKV=draft.probs_BKV[:, 1:],
            num_drafts_B=draft.num_drafts_B - 1,
        )
        ids_BK = torch.cat([settled.token_ids_BL, rest.token_ids_BK], dim=1)
        clock = self._charge("sampler_s", clock)
        logits_BKV = self.policy.verify_logits(ids_BK, self._cache.window(0, size, num_drafts))
        clock = self._charge("forward_s", clock)
        logits_BKV, bad_targets_B = _without_non_finite(logits_BKV)
        others = laws.target_rows(logits_BKV, ids_BK, draft_logits_BKV[:, 1:], rest.num_drafts_B)
        verified = verify_block(rest, others.probs_BLV, uniforms[:, 1 : num_drafts + 1])
        self._charge("sampler_s", clock)
        self._cache.commit(0, size, verified.num_committed_B)
        return _Verified(
            verdict=join_verdicts(settled, verified),
            logits=(anchor_logits_B1V, logits_BKV),
            target_probs=(first.probs_BLV, others.probs_BLV),
            bad_targets_B=bad_targets_B,
            is_empty_BL=_joined(first.is_empty_BL, others.is_empty_BL, num_drafts),
            states_BPLW=None,
            parts=((draft, settled), (rest, verified)),
        )

    def _audited(self, batch: list[RunningRequest]) -> tuple[list[int], list[tuple[int, int, int]]]:
        """Tokens of each text before the step commits, and where its draft rows come from."""
        num_before = [running.num_tokens for running in batch]
        if not self.plan.num_drafts:
            return num_before, [(0, 0, 0)] * len(batch)
        if not self.plan.levels:
            return num_before, [(length, 0, self.plan.num_drafts) for length in num_before]
        proposals = [running.proposal for running in batch]
        return num_before, [each.origin for each in proposals if each is not None]

    def _draft_logits(self, batch: list[RunningRequest], anchors_B: Tensor) -> tuple[Tensor, Tensor]:
        """Draft rows, float32 (B, K, V), and how many of them each request has.

        From a draft forward they come behind the anchor's causal row: (B, K + 1, V).
        """
        plan, device = self.plan, self.policy.device
        if plan.levels:
            proposals = [running.proposal for running in batch]
            rows = [proposal.logits_KV for proposal in proposals if proposal is not None]
            counts = [proposal.num_drafts for proposal in proposals if proposal is not None]
            return torch.stack(rows), torch.tensor(counts, device=device)
        num_drafts_B = torch.full((len(batch),), plan.num_drafts, device=device)
        if plan.num_drafts:
            window = self._cache.window(0, len(batch), plan.num_drafts + 1)
            return self.policy.draft_logits(anchors_B, plan.num_drafts, window), num_drafts_B
        return torch.empty((len(batch), 0, self.policy.vocab_size), device=device), num_drafts_B

    def _start_proposals(self, batch: list[RunningRequest]) -> None:
        """A draft forward of their own for requests that no fused step has proposed for."""
        first = next((slot for slot, running in enumerate(batch) if running.proposal is None), None)
        if first is None:
            return
        clock = self._clock()
        num_drafts, late = self.plan.num_drafts, batch[first:]  # those that join lie behind the others
        anchors_B = torch.tensor([running.state[0] for running in late], device=self.policy.device)
        window = self._cache.window(first, len(batch), num_drafts + 1)
        logits_BKV = self.policy.draft_logits(anchors_B, num_drafts, window)[:, 1:]
        for logits_KV, running in zip(logits_BKV, late, strict=True):
            if running.proposal is None:
                origin = (running.num_tokens, 0, num_drafts)
                running.start_proposal(Proposal(logits_KV=logits_KV, num_drafts=num_drafts, origin=origin))
        self.times.start_s += self._charge("forward_s", clock) - clock

    def _keep_proposals(
        self, batch: list[RunningRequest], states_BPLW: Tensor, num_accepted_B: Tensor
    ) -> None:
        """Give each request that goes on the proposal made for what was accepted.

        That is the one of the largest level p at or below the n accepted drafts. Its slot j stands p + 1 + j
        positions behind the old anchor, so slots n - p + 1 and up stand on those of the next drafts.
        """
        rows = [row for row, running in enumerate(batch) if running.is_running]
        if not rows:
            return
        clock = self._clock()
        num_drafts, device = self.plan.num_drafts, self.policy.device
        levels_P = torch.tensor(self.plan.levels, device=device)
        accepted_B = num_accepted_B[rows]
        chosen_B = (levels_P <= accepted_B[:, None]).sum(dim=1) - 1
        shift_B = accepted_B - levels_P[chosen_B]
        slots_BK = (shift_B[:, None] + 1 + torch.arange(num_drafts, device=device)).clamp(max=num_drafts)
        rows_B1 = torch.tensor(rows, device=device)[:, None]
        states_BKW = states_BPLW[rows_B1, chosen_B[:, None], slots_BK]
        logits_BKV = self.policy.proposal_logits(states_BKW)
        shifts = shift_B.tolist()
        for row, logits_KV, shift in zip(rows, logits_BKV, shifts, strict=True):
            # It knows all but the drafts past its level and the token that the verdict added.
            origin = (batch[row].num_tokens - shift - 1, shift + 1, num_drafts + 1)
            batch[row].proposal = Proposal(logits_KV=logits_KV, num_drafts=num_drafts - shift, origin=origin)
        self._charge("forward_s", clock)

    def _commit(
        self,
        batch: list[RunningRequest],
        num_drafts: list[int],
        verdict: Verdict,
        policy_logprobs_BL: Tensor,
        failed: dict[int, str],
    ) -> StepResult:
        """Make tokens final and let finished requests leave."""
        committed = verdict.num_committed_B.tolist()
        tokens, is_draft, policy, behavior = (
            column.tolist()
            for column in (
                verdict.token_ids_BL,
                verdict.is_draft_BL,
                policy_logprobs_BL,
                verdict.behavior_logprobs_BL,
            )
        )
        commits, finished = [], []
        for slot in reversed(range(len(batch))):  # from the last slot, so that moves touch none still to come
            running = batch[slot]
            running.count_step(self.plan, num_drafts[slot])
            if slot in failed:
                error = f"{failed[slot]} for request {running.request.request_id!r}"
                running.finish_reason = "error"
                finished.append(running.rollout("error", error=error))
                self._cache.scrub(slot)
                held: tuple[int, ...] = ()
            else:
                kept = committed[slot]
                commit = running.commit(
                    tokens[slot][:kept],
                    is_draft[slot][:kept],
                    policy[slot][:kept],
                    behavior[slot][:kept],
                    self.policy_version,
                )
                commits.append(commit)
                if running.finish_reason is None:
                    continue
                finished.append(running.rollout(running.finish_reason))
                held = running.cached_ids
            del self._requests[running.request.request_id]
            self._release(slot, held)
        return StepResult(commits=tuple(reversed(commits)), finished=tuple(reversed(finished)))

    def _prefill(self, start: int, joining: list[RunningRequest]) -> None:
        """Write the cache rows of everything before each request's anchor."""
        num_reused = prefill(self.policy, self._cache, start, [running.cached_ids for running in joining])
        for running, taken in zip(joining, num_reused, strict=True):
            running.count_prefill(len(running.cached_ids) - taken, taken)

    def _release(self, slot: int, token_ids: tuple[int, ...]) -> None:
        """Free a slot, which goes on holding the rows of these tokens."""
        self._cache.hold(slot, token_ids)
        move = self._scheduler.release(slot)
        if move is not None:
            self._cache.swap(move.source, move.target)
        self._cache.clear(len(self._scheduler.running))

    def _guide(self, request: Request) -> Guide | None:
        """A walk through the constraint of its own, from its first token."""
        constraint = request.sampling.constraint
        if constraint is None:
            return None
        ends = frozenset(self.policy.eos_token_ids)
        return constraint.start(self.policy.vocab_size, self.policy.tokenizer, ends)

    def _stop_rule(self, request: Request) -> StopRule:
        ends = () if request.sampling.ignore_eos else self.policy.eos_token_ids
        return StopRule(
            stop_token_ids=frozenset((*ends, *request.sampling.stop_token_ids)),
            stop=request.sampling.stop,
            max_tokens=min(request.sampling.max_tokens, self.limits.max_length - len(request.prompt_ids)),
            decode=self._decode,
        )

    def _charge(self, part: str, since: float) -> float:
        now = self._clock()
        setattr(self.times, part, getattr(self.times, part) + now - since)
        return now


def check_plan(plan: Plan, policy: Policy) -> None:
    """Refuse a plan the policy cannot follow; warn of more drafts than it was trained for."""
    if plan.num_drafts and not policy.can_draft:
        raise InvalidInput(
            f"plan {plan.name} needs a policy that drafts, and this one has neither a draft adapter nor a "
            "mask token; use 'plain', or make an adapter with `blockroll convert`"
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


def _failures(bad_drafts_B: Tensor | None, verified: _Verified) -> dict[int, str]:
    """By slot, what is wrong with the rows a request was decoded from."""
    failed = {}
    for name, bad_B in (("draft", bad_drafts_B), ("verify", verified.bad_targets_B)):
        for slot in [] if bad_B is None else bad_B.nonzero().flatten().tolist():
            failed[slot] = f"{NonFiniteLogits.__name__}: {name} logits hold NaN or infinity"
    if verified.is_empty_BL is not None:
        # A row behind the last committed token decided nothing.
        offsets_L = torch.arange(verified.is_empty_BL.shape[1], device=verified.is_empty_BL.device)
        is_met_BL = verified.is_empty_BL & (offsets_L < verified.verdict.num_committed_B[:, None])
        for slot in is_met_BL.any(dim=1).nonzero().flatten().tolist():
            failed.setdefault(
                slot,
                f"{EmptySupport.__name__}: constraint, masks and logits processors leave no next token",
            )
    return failed
