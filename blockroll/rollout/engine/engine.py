"""One engine: continuous batching of requests under one decoding plan, or one chosen for each step.

A step is: admit waiting requests and prefill them, decode (step.py), commit. A planner is asked before it
unless its last choice holds, and told what steps took unless a prefill did a part of them. The engine owns
the cache and the requests' state.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from blockroll.errors import InvalidInput, RequestFailed
from blockroll.policies.base import Policy
from blockroll.rollout.engine.cache import SlotCache
from blockroll.rollout.engine.drafting import Drafter
from blockroll.rollout.engine.ends import Decode
from blockroll.rollout.engine.plans import PlanChooser, Planning, at_hand, check_plan, drafters_of
from blockroll.rollout.engine.prefill import prefill
from blockroll.rollout.engine.requests import Limits, check_request
from blockroll.rollout.engine.room import CacheRoom
from blockroll.rollout.engine.running import RunningRequest
from blockroll.rollout.engine.scheduler import Scheduler
from blockroll.rollout.engine.starting import Starter
from blockroll.rollout.engine.step import Decoded, Decoder
from blockroll.rollout.engine.trace import EngineTimes, Observer
from blockroll.types import Commit, Plan, Request, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step made final."""

    commits: tuple[Commit, ...]
    finished: tuple[Rollout, ...]


class BareEngine:
    """Decodes requests with one policy, one plan a step for all. Not thread-safe: one caller at a time."""

    own_drafters: tuple[Callable[[], Drafter], ...] = ()  # that plans may name without handing them in

    def __init__(
        self,
        policy: Policy,
        *,
        plan: Plan | PlanChooser,
        max_batch_size: int = 64,
        max_length: int = 0,
        max_cache_rows: int = 0,
        decode: Decode | None = None,
        policy_version: int = 0,
        observers: Iterable[Observer] = (),
        drafters: Iterable[Drafter] = (),
        reproducible: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`max_length` 0 is what the policy was built for.

        Stop strings are looked for in what `decode` makes of tokens; None: the policy's own tokenizer, with
        special tokens kept. `observers` are told of every step in turn, once it is final. `drafters` serve
        the plans that name them; one of the class of an own one takes its place. `reproducible` refuses
        requests whose text would depend on the plans that a planner chooses. The cache has room for the
        longest text that the requests at hand can become. `max_cache_rows` bounds its rows over all slots:
        then fewer than `max_batch_size` requests run together. 0: no bound.
        """
        self.planner = None if isinstance(plan, Plan) else plan
        plans = (plan,) if isinstance(plan, Plan) else plan.candidates
        self._drafters = at_hand((make() for make in self.own_drafters), drafters)
        for each in plans:
            check_plan(each, policy, self._drafters)
        if max_length > policy.max_length:
            raise InvalidInput(
                f"max_length is {max_length}, but the policy serves {policy.max_length} positions"
            )
        self.policy = policy
        self.plan = plans[0]  # of the latest step
        self.policy_version = policy_version
        self._room = CacheRoom(
            max_slots=max_batch_size,
            max_rows=max_cache_rows,
            block_rows=max(each.rows_per_forward for each in plans),
            max_length=max_length or policy.max_length,
        )
        self.limits = Limits(
            vocab_size=policy.vocab_size,
            max_length=self._room.max_length,
            boundaries=policy.length_boundaries,
            max_text=self._room.max_text,
            is_plan_free=reproducible and len(plans) > 1 and any(each.layout for each in plans),
        )
        self._scheduler = Scheduler(max_batch_size=max_batch_size)
        self._cache = SlotCache(policy)
        self._decoder = Decoder(policy, self._cache, self._drafters, clock)
        self._requests: dict[str, RunningRequest] = {}
        # What a step has made final stands here until a step returns: an exception on the way loses nothing.
        self._commits: list[Commit] = []
        self._finished: dict[str, Rollout] = {}
        self._is_interrupted = False  # a change of what runs has begun and not ended
        self._starter = Starter(policy, self.limits, decode, numbers_servings=len(drafters_of(plans)) > 1)
        self._observers = tuple(observers)
        self._clock = clock
        self._planning = (
            None if self.planner is None else Planning(self.planner, self._drafters, policy, clock)
        )

    @property
    def num_requests(self) -> int:
        """Requests waiting and running, and those whose rollouts no step has returned yet."""
        return len(self._requests) + len(self._finished)

    @property
    def times(self) -> EngineTimes:
        """Where the time of its steps went."""
        return self._decoder.times

    def reset_times(self) -> None:
        """Count from 0 again."""
        self._decoder.times = EngineTimes()

    def submit(self, requests: Iterable[Request], *, are_checked: bool = False) -> None:
        """Queue requests; all of them are checked before the first is queued.

        `are_checked` says that `check_request` has passed them under this engine's limits.
        """
        requests = tuple(requests)
        new: set[str] = set()
        for request in requests:
            if not are_checked:
                check_request(request, self.limits)
            if any(request.request_id in each for each in (new, self._requests, self._finished)):
                raise InvalidInput(
                    f"request id {request.request_id!r} is already being served; ids must be unique"
                )
            new.add(request.request_id)
        joining = [self._starter.start(request) for request in requests]
        with self._change():
            num_slots = self._room.make(requests)
            # What runs is never driven out.
            self._scheduler.max_batch_size = max(num_slots, len(self._scheduler.running))
            self._requests |= {running.request.request_id: running for running in joining}
            for running in joining:
                self._scheduler.submit(running.request.request_id, running.num_tokens - 1)

    def abort(self, request_ids: Iterable[str]) -> tuple[Rollout, ...]:
        """End requests now; what each had committed comes back with finish reason `abort`.

        One that had ended in a step that then raised comes back as it ended. Unknown ids are left out.
        """
        served = {each: None for each in request_ids if each in self._requests or each in self._finished}
        with self._change():
            for request_id in served:
                if request_id in self._requests:
                    self._finished[request_id] = self._requests[request_id].rollout()
                    self._leave(request_id)
        self._tell_drafters(served)
        aborted = tuple(self._finished[request_id] for request_id in served)
        kept = {name: rollout for name, rollout in self._finished.items() if name not in served}
        self._finished = kept
        return aborted

    def release_memory(self) -> None:
        """Give the cache's memory back while nothing runs; the next request takes it again."""
        if self._requests:
            raise InvalidInput(f"{self.num_requests} requests are being served: their cache is in use")
        with self._change():
            self._cache.clear()
            self._room.rows_per_slot = 0

    def forget_prefixes(self) -> None:
        """No text starts from keys and values of one that has ended: benchmarks repeat their prompts."""
        with self._change():
            self._cache.forget()

    def change_weights(self, policy_version: int) -> None:
        """The policy's weights are those of this version, wholly or not at all; no row of others is read."""
        with self._change():
            self._cache.invalidate()
            self.policy.weights_changed()
            self.policy_version = policy_version

    def recompute_cache(self) -> None:
        """The policy's weights have changed: rebuild the keys and values of what runs, forget all others.

        If a forward raises, the next step begins with what is missing.
        """
        with self._change():
            self._cache.invalidate()
            self._prefill_missing()

    def step(self) -> StepResult:
        """Decode one step for every running request; joins waiting requests first.

        If it raises, nothing is lost: what it had made final comes with the next step, and all else is as it
        was before. Call it again, or abort requests.
        """
        with self._change():
            self._prefill_missing()
            num_running = len(self._scheduler.running)
            batch = [
                self._requests[request_id]
                for request_id in (*self._scheduler.running, *self._scheduler.joining())
            ]
            if batch:
                self._decode_batch(batch, num_running)
        if not self._requests:
            self.check_integrity()
        self._tell_drafters(self._finished)
        result = StepResult(commits=tuple(self._commits), finished=tuple(reversed(self._finished.values())))
        self._commits, self._finished = [], {}
        return result

    def _tell_drafters(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            for drafter in self._drafters.values():
                drafter.finished(self._finished[request_id])

    def check_integrity(self) -> None:
        """Raise AssertionError where requests, slots and cache contradict each other."""
        self._scheduler.check_integrity()
        running = self._scheduler.running
        assert self._requests.keys() == {*running, *self._scheduler.waiting}, "a request is nowhere scheduled"
        if self._is_interrupted:
            return  # the next call puts it right
        self._cache.check_integrity()
        assert self._cache.num_open == len(running), f"{self._cache.num_open} slots, not {len(running)}"
        for slot, request_id in enumerate(running):
            is_held = tuple(self._cache.tokens(slot)) == self._requests[request_id].token_ids[:-1]
            assert is_held, f"slot {slot} does not hold the text of request {request_id!r}"

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Around all that changes what runs: begins by putting right what an exception left half done."""
        if self._is_interrupted:
            self._restore()
        self._is_interrupted = True
        yield
        self._is_interrupted = False

    def _restore(self) -> None:
        """Requests say what was committed: all else follows from them."""
        self._cache.repair()
        for request_id, running in tuple(self._requests.items()):
            if not running.is_running:
                self._finished[request_id] = running.rollout()
            elif request_id not in self._finished:
                self._restart(running)
            if request_id in self._finished:
                self._scheduler.drop(request_id)
                del self._requests[request_id]
        scheduled = {*self._scheduler.running, *self._scheduler.waiting}
        for request_id, running in self._requests.items():
            if request_id not in scheduled:
                self._scheduler.submit(request_id, running.num_tokens - 1)
        for slot, request_id in enumerate(self._scheduler.running):
            cached = self._requests[request_id].token_ids[:-1]
            if slot >= self._cache.num_open or tuple(self._cache.tokens(slot)[: len(cached)]) != cached:
                self._cache.close(slot)
                break
            self._cache.keep(slot, len(cached))
        self._cache.close(len(self._scheduler.running))

    def _restart(self, running: RunningRequest) -> None:
        """Walk its constraint anew: an interrupt may have stopped it anywhere."""
        try:
            running.restart(self._starter.guide(running.request))
        except Exception as error:  # noqa: BLE001 - what a request brings along ends that request alone
            running.fail(f"{RequestFailed.__name__}: its constraint raised {error!r}")
            self._finished[running.request.request_id] = running.rollout()

    def _decode_batch(self, batch: list[RunningRequest], num_running: int) -> None:
        """One step of those that run and, behind them, those that join."""
        lengths, choice_s = None, 0.0
        if self._planning is not None:
            choice, choice_s = self._planning.choose(batch, len(batch) - num_running)
            self._change_plan(choice.plan, batch)
            lengths = choice.lengths
        first_logits = None
        if num_running < len(batch):
            # Growing copies the cache, so it grows by powers of two.
            num_slots = max(1 << (len(batch) - 1).bit_length(), self._cache.num_slots)
            self._cache.reserve(
                num_slots=min(num_slots, self._scheduler.max_batch_size), capacity=self._room.rows_per_slot
            )
            num_masks = None if num_running else self._decoder.num_masks_at_start(self.plan)
            first_logits = self._prefill(num_running, batch[num_running:], num_masks)
            self._scheduler.admit()
        started, start_s, num_commits = self._clock(), self.times.start_s, len(self._commits)
        self._settle(batch, self._decoder.decode(batch, self.plan, first_logits, lengths))
        seconds = self._clock() - started
        self.times.step_s += seconds + choice_s
        self.times.num_steps += 1
        if self._planning is not None and first_logits is None:
            self._planning.observe(
                seconds=seconds,
                start_seconds=self.times.start_s - start_s,
                num_tokens=sum([len(commit.token_ids) for commit in self._commits[num_commits:]]),
                is_last=len(self._scheduler.running) < len(batch),
            )

    def _change_plan(self, plan: Plan, batch: list[RunningRequest]) -> None:
        """Decode by this plan from now on; proposals of another drafter or another K would not fit it."""
        if (plan.drafter, plan.num_drafts) != (self.plan.drafter, self.plan.num_drafts):
            for running in batch:
                running.proposal = None
        self.plan = plan

    def _settle(self, batch: list[RunningRequest], decoded: Decoded) -> None:
        num_before = [running.num_tokens for running in batch]
        self._commit(batch, decoded)
        if not self._observers:
            return
        trace = decoded.trace(
            batch,
            num_before,
            plan=self.plan,
            version=self.policy_version,
            precision=str(self.policy.kv_shape.dtype).removeprefix("torch."),
            is_last=not self._requests,
        )
        for observer in self._observers:
            observer(trace)

    def _commit(self, batch: list[RunningRequest], decoded: Decoded) -> None:
        """Make tokens final and let finished requests leave."""
        verdict, failed = decoded.verified.verdict, decoded.failed
        num_drafts, committed = decoded.draft.num_drafts_B.tolist(), verdict.num_committed_B.tolist()
        tokens, is_draft, policy, behavior = (
            column.tolist()
            for column in (
                verdict.token_ids_BL,
                verdict.is_draft_BL,
                decoded.policy_logprobs_BL,
                verdict.behavior_logprobs_BL,
            )
        )
        for slot, (num_before, _) in failed.items():
            committed[slot] = num_before
        # The rows of the anchor and of all new tokens but the last, which is the next anchor.
        rows = [
            (running.anchor, *tokens[slot][: kept - 1]) if kept else ()
            for slot, (running, kept) in enumerate(zip(batch, committed, strict=True))
        ]
        self._cache.commit(0, rows)
        num_commits = len(self._commits)
        for slot in reversed(range(len(batch))):  # from the last slot, so that moves touch none still to come
            running, kept = batch[slot], committed[slot]
            error = None
            try:
                commit = running.commit(
                    tokens[slot][:kept],
                    is_draft[slot][:kept],
                    policy[slot][:kept],
                    behavior[slot][:kept],
                    self.policy_version,
                    plan=self.plan,
                    num_drafts=num_drafts[slot],
                    proposal=decoded.proposals[slot],
                )
            except RequestFailed as refusal:
                error = f"{RequestFailed.__name__}: {refusal}"
            else:
                # No call: no interrupt comes between the text and what the step says of it.
                self._commits[num_commits:num_commits] = [commit] if kept else []
                if slot in failed and running.is_running:
                    error = failed[slot][1]
            if error is not None:
                running.fail(error)
                if not kept:
                    self._cache.scrub(slot)
            if not running.is_running:
                speedups = self.planner.speedups if self.planner is not None else None
                self._finished[running.request.request_id] = running.rollout(speedups)
                self._leave(running.request.request_id)

    def _prefill_missing(self) -> None:
        """Rows of running texts that the cache does not hold: weights have changed, or a step raised."""
        start, running = self._cache.num_open, self._scheduler.running
        if start < len(running):
            self._prefill(start, [self._requests[request_id] for request_id in running[start:]])

    def _prefill(
        self, start: int, joining: list[RunningRequest], num_drafts: int | None = None
    ) -> Tensor | None:
        """Write the cache rows of everything before each request's anchor; the first logits, if they came."""
        texts = [running.token_ids for running in joining]
        num_reused, first_logits = prefill(self.policy, self._cache, start, texts, num_drafts=num_drafts)
        for running, taken in zip(joining, num_reused, strict=True):
            running.count_prefill(running.num_tokens - 1 - taken, taken)
        return first_logits

    def _leave(self, request_id: str) -> None:
        """A request is served no more; the rows of its text may be taken over."""
        slot = self._scheduler.drop(request_id)
        if slot is not None and slot < self._cache.num_open:
            self._cache.keep(slot, self._requests[request_id].num_tokens - 1)
            self._cache.release(slot)
        del self._requests[request_id]
