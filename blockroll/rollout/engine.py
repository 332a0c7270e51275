"""One engine: continuous batching of requests under one decoding plan.

A step is: admit waiting requests and prefill them, draft (if the plan drafts), verify, commit. The
engine owns the cache and the per-request state; it knows neither processes nor weights' origins.

Law: with the target law, committed tokens follow the causal policy exactly, whatever the drafts are.

Shapes: B running requests, K drafted tokens, L = K + 1 verify rows, V vocabulary.
"""

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from blockroll.errors import InvalidInput, NonFiniteLogits
from blockroll.policies.base import Policy
from blockroll.rollout.cache import SlotCache
from blockroll.rollout.requests import Limits, check_request
from blockroll.rollout.running import RunningRequest, StopRule
from blockroll.rollout.scheduler import Scheduler
from blockroll.samplers import draw_draft, policy_logprobs, step_uniforms, target_probs, verify_block
from blockroll.types import Commit, Draft, Plan, Request, Rollout, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """Everything the sampler saw and decided in one step; rows follow `request_ids`."""

    request_ids: tuple[str, ...]
    draft: Draft
    target_probs_BLV: Tensor
    draft_uniforms_BK: Tensor
    verify_uniforms_BL: Tensor
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
    sampler_s: float = 0.0

    @property
    def host_s(self) -> float:
        """Everything but the policy forward and the sampler."""
        return self.step_s - self.forward_s - self.sampler_s


class Engine:
    """Decodes requests with one policy under one plan. Not thread-safe: one caller at a time."""

    def __init__(
        self,
        policy: Policy,
        *,
        plan: Plan,
        max_batch_size: int = 64,
        max_length: int = 0,
        decode: Callable[[list[int]], str] | None = None,
        policy_version: int = 0,
        observer: Callable[[StepRecord], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`max_length` 0 is what the policy was built for; `decode` is needed for stop strings only."""
        check_plan(plan, policy)
        if max_length > policy.max_length:
            raise InvalidInput(
                f"max_length is {max_length}, but the policy was built for {policy.max_length} positions"
            )
        self.policy = policy
        self.plan = plan
        self.policy_version = policy_version
        self.times = EngineTimes()
        self.limits = Limits(
            vocab_size=policy.vocab_size,
            max_length=max_length or policy.max_length,
            mask_token_id=policy.mask_token_id,
        )
        self._scheduler = Scheduler(max_batch_size=max_batch_size)
        self._cache = SlotCache(
            num_slots=max_batch_size,
            capacity=self.limits.max_length + plan.num_drafts + 1,
            device=policy.device,
        )
        self._requests: dict[str, RunningRequest] = {}
        self._decode = decode
        self._observer = observer
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
        for request in requests:
            running = RunningRequest(request, self._stop_rule(request))
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
                self._release(self._scheduler.running.index(request_id))
            aborted.append(running.rollout("abort"))
        return tuple(aborted)

    def recompute_cache(self) -> None:
        """Rebuild the keys and values of running requests, after the policy's weights have changed."""
        running = self._scheduler.running
        for slot in range(len(running)):
            self._cache.clear(slot)
        self._prefill(0, [self._requests[request_id] for request_id in running])

    def step(self) -> StepResult:
        """Decode one step for every running request; joins waiting requests first."""
        admitted = self._scheduler.admit()
        if admitted:
            start = len(self._scheduler.running) - len(admitted)
            self._prefill(start, [self._requests[request_id] for request_id in admitted])
        batch = [self._requests[request_id] for request_id in self._scheduler.running]
        if not batch:
            return StepResult(commits=(), finished=())
        started = self._clock()
        result = self._decode_step(batch)
        self.times.step_s += self._clock() - started
        self.times.num_steps += 1
        return result

    def _decode_step(self, batch: list[RunningRequest]) -> StepResult:
        num_drafts, size = self.plan.num_drafts, len(batch)
        state = torch.tensor([running.state for running in batch], device=self.policy.device)
        anchors_B, seeds_B, attempts_B = state.unbind(dim=1)
        temperatures = torch.tensor([running.temperatures for running in batch], device=self.policy.device)
        temperature_B, draft_temperature_B = temperatures.unbind(dim=1)
        positions_B = self._cache.lengths_N[:size] + 1

        clock = self._clock()
        draft_uniforms_BK, verify_uniforms_BL = step_uniforms(seeds_B, positions_B, attempts_B, num_drafts)
        clock = self._charge("sampler_s", clock)
        if num_drafts:
            window = self._cache.window(0, size, num_drafts + 1)
            draft_logits_BKV = self.policy.draft_logits(anchors_B, num_drafts, window)
            clock = self._charge("forward_s", clock)
            draft_logits_BKV, bad_drafts_B = _without_non_finite(draft_logits_BKV)
            draft = draw_draft(draft_logits_BKV, draft_temperature_B, draft_uniforms_BK)
            ids_BL = torch.cat([anchors_B[:, None], draft.token_ids_BK], dim=1)
            clock = self._charge("sampler_s", clock)
        else:
            bad_drafts_B = None
            ids_BL = anchors_B[:, None]
            draft = Draft(
                token_ids_BK=ids_BL[:, :0],
                probs_BKV=torch.empty(
                    (size, 0, self.policy.vocab_size), dtype=torch.float64, device=ids_BL.device
                ),
            )
        window = self._cache.window(0, size, num_drafts + 1)
        logits_BLV = self.policy.verify_logits(ids_BL, window)
        clock = self._charge("forward_s", clock)

        logits_BLV, bad_targets_B = _without_non_finite(logits_BLV)
        target_probs_BLV = target_probs(logits_BLV, temperature_B)
        verdict = verify_block(draft, target_probs_BLV, verify_uniforms_BL)
        policy_logprobs_BL = policy_logprobs(logits_BLV, verdict.token_ids_BL, temperature_B)
        self._charge("sampler_s", clock)

        if self._observer is not None:
            self._observer(
                StepRecord(
                    request_ids=self._scheduler.running,
                    draft=draft,
                    target_probs_BLV=target_probs_BLV,
                    draft_uniforms_BK=draft_uniforms_BK,
                    verify_uniforms_BL=verify_uniforms_BL,
                    verdict=verdict,
                )
            )
        failed = _failures(bad_drafts_B, bad_targets_B)
        return self._commit(batch, verdict, policy_logprobs_BL, failed)

    def _commit(
        self,
        batch: list[RunningRequest],
        verdict: Verdict,
        policy_logprobs_BL: Tensor,
        failed: dict[int, str],
    ) -> StepResult:
        """Make tokens final, keep their cache rows, and let finished requests leave."""
        self._cache.commit(0, len(batch), verdict.num_accepted_B + 1)
        accepted = verdict.num_accepted_B.tolist()
        tokens, policy, behavior = (
            column.tolist()
            for column in (verdict.token_ids_BL, policy_logprobs_BL, verdict.behavior_logprobs_BL)
        )
        commits, finished = [], []
        for slot in reversed(range(len(batch))):  # from the last slot, so that moves touch none still to come
            running = batch[slot]
            running.count_step(self.plan)
            if slot in failed:
                error = (
                    f"{NonFiniteLogits.__name__}: {failed[slot]} for request {running.request.request_id!r}"
                )
                finished.append(running.rollout("error", error=error))
                self._cache.scrub(slot)
            else:
                kept = accepted[slot] + 1
                commit = running.commit(
                    tokens[slot][:kept], policy[slot][:kept], behavior[slot][:kept], self.policy_version
                )
                commits.append(commit)
                if running.finish_reason is None:
                    continue
                finished.append(running.rollout(running.finish_reason))
            del self._requests[running.request.request_id]
            self._release(slot)
        return StepResult(commits=tuple(reversed(commits)), finished=tuple(reversed(finished)))

    def _prefill(self, start: int, joining: list[RunningRequest]) -> None:
        """Write the cache rows of everything before each request's anchor."""
        stop = start + len(joining)
        lengths = [len(running.cached_ids) for running in joining]
        for slot in range(start, stop):
            self._cache.clear(slot)
        if max(lengths, default=0) == 0:
            return
        ids_BR = torch.zeros((len(joining), max(lengths)), dtype=torch.int64)
        for row, running in enumerate(joining):
            ids_BR[row, : lengths[row]] = torch.tensor(running.cached_ids, dtype=torch.int64)
        ids_BR = ids_BR.to(self.policy.device)
        self.policy.prefill(ids_BR, self._cache.window(start, stop, max(lengths)))
        self._cache.commit(start, stop, torch.tensor(lengths, device=self.policy.device))

    def _release(self, slot: int) -> None:
        move = self._scheduler.release(slot)
        if move is not None:
            self._cache.move(move.source, move.target)
        self._cache.clear(len(self._scheduler.running))

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
    if plan.levels:
        raise InvalidInput(f"plan {plan.name} is not served; allowed are plain and two_forward(K)")
    if plan.num_drafts and policy.mask_token_id is None:
        raise InvalidInput(
            f"plan {plan.name} needs a policy that drafts, and this one has no mask token; use 'plain'"
        )
    if plan.num_drafts > policy.trained_drafts:
        warnings.warn(
            f"plan {plan.name} drafts more than the {policy.trained_drafts} tokens this policy was "
            "trained for; the law stays exact, the later drafts will rarely be accepted",
            stacklevel=2,
        )


def _without_non_finite(logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits fit for the sampler, and which requests held NaN or infinity (None if none did)."""
    # The largest magnitude is NaN if any entry is, and costs one pass.
    bad_B = ~torch.isfinite(logits.abs().amax(dim=(1, 2)))
    if not bad_B.any():
        return logits, None
    return torch.where(bad_B[:, None, None], 0.0, logits), bad_B


def _failures(bad_drafts_B: Tensor | None, bad_targets_B: Tensor | None) -> dict[int, str]:
    failed = {}
    for name, bad_B in (("draft", bad_drafts_B), ("verify", bad_targets_B)):
        for slot in [] if bad_B is None else bad_B.nonzero().flatten().tolist():
            failed[slot] = f"{name} logits hold NaN or infinity"
    return failed
