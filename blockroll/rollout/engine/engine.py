"""One engine: continuous batching of requests under one decoding plan, or one chosen for each step.

A step is: a chunk of the prompts that join (admission.py), decode what runs (step.py), commit. Where it can
be, the next step is queued before this one is read (overlap.py). A planner is asked before a step unless its
last choice holds, and told what steps took unless a prefill did a part of them. The engine owns the cache and
the requests' state.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from blockroll.errors import InvalidInput
from blockroll.kernels.choice import Kernels, using
from blockroll.policies.base import Policy
from blockroll.rollout.engine.admission import Admission
from blockroll.rollout.engine.cache.layouts import PAGE_SIZE, Layout, kernels_of, make_cache
from blockroll.rollout.engine.chunks import MAX_PREFILL_ROWS, PREFILL_CHUNK
from blockroll.rollout.engine.drafting import Drafter
from blockroll.rollout.engine.ends import Decode
from blockroll.rollout.engine.launched import Begun, Decoded, Launched
from blockroll.rollout.engine.overlap import Overlap, may_be_followed, overlaps
from blockroll.rollout.engine.plans import PlanChooser, Planning, at_hand, check_plan, drafters_of
from blockroll.rollout.engine.prefill import Chunk
from blockroll.rollout.engine.repeated import Graphs, RepeatedPolicy, forwards_of
from blockroll.rollout.engine.requests import Limits, check_request
from blockroll.rollout.engine.room import CacheRoom
from blockroll.rollout.engine.running import RunningRequest
from blockroll.rollout.engine.scheduler import Scheduler
from blockroll.rollout.engine.served import ServedRequests, StepResult
from blockroll.rollout.engine.shortage import Shortage, Shrinking, is_shortage, shortage_of
from blockroll.rollout.engine.starting import Starter
from blockroll.rollout.engine.step import Decoder
from blockroll.rollout.engine.trace import EngineTimes, Observer, Observers, Watcher
from blockroll.types import Plan, Request, Rollout


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
        cache: Layout = "auto",
        page_size: int = PAGE_SIZE,
        graphs: Graphs = "auto",
        overlap: Overlap = "auto",
        kernels: Kernels = "auto",
        prefill_chunk: int = PREFILL_CHUNK,
        max_prefill_rows: int = MAX_PREFILL_ROWS,
        decode: Decode | None = None,
        policy_version: int = 0,
        observers: Iterable[Observer | Watcher] = (),
        drafters: Iterable[Drafter] = (),
        reproducible: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`max_length` 0 is what the policy was built for.

        Stop strings are looked for in what `decode` makes of tokens; None: the policy's own tokenizer, with
        special tokens kept. `observers` are told of every step in turn, once it is final, a `Watcher` of one
        in so many. `drafters` serve
        the plans that name them; one of the class of an own one takes its place. `reproducible` refuses
        requests whose text would depend on the plans that a planner chooses. The cache has room for the
        longest text that the requests at hand can become. `max_cache_rows` bounds its rows over all slots:
        then fewer than `max_batch_size` requests run together. 0: no bound. `cache` is how its rows lie: in
        slots as long as the longest text, or in pages of `page_size` rows, taken as texts grow. `graphs` says
        whether forwards over pages run in few shapes, captured as graphs on a GPU (`repeated.py`). `overlap`
        says whether a step is queued before the one before is read: never where one of them is observed.
        `kernels` says which form of the operations runs: `auto` is Triton's on a GPU, and what it
        came to stands in `kernels`, with the reason. A forward of a prefill has at most `max_prefill_rows`
        rows, and `prefill_chunk` where requests wait for it.
        """
        self._observers = Observers(observers)
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
        self.plan = self._asked = plans[0]  # of the latest step, and without a planner of all
        self.policy_version = policy_version
        self.kernels = kernels_of(kernels, policy, cache, page_size)
        sizes = {"page_size": page_size, "max_rows": max_cache_rows}
        self._cache = make_cache(policy, cache, self.kernels.form, **sizes)
        self._room = CacheRoom(
            page_size=self._cache.page_size,
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
        self._forwards = forwards_of(policy, self._cache, graphs)
        self._decoder = Decoder(self._forwards, self._cache, self._drafters, clock)
        self._starter = Starter(policy, self.limits, decode, numbers_servings=len(drafters_of(plans)) > 1)
        self._served = ServedRequests(self._scheduler, self._cache, self._starter)
        parts = (self._cache, self._scheduler, self._served, self._room)
        self._admission = Admission(
            policy, *parts, prefill_chunk=prefill_chunk, max_prefill_rows=max_prefill_rows
        )
        self._shrinking = Shrinking(
            self._forwards, *parts, self._admission, keeps_proposals=self.planner is None
        )
        self._overlaps = overlaps(policy, self._cache, overlap) and not self._observers.want_all
        self._held: Plan | None = None  # by which all steps decode, whatever was asked or is chosen
        self._in_flight: Launched | None = None  # has every request that runs, and no prompt beside it
        self._told: dict[str, Rollout] = {}  # what drafters know of what no step has returned yet
        self._is_interrupted = False  # a change of what runs has begun and not ended
        self._clock = clock
        self._planning = (
            None if self.planner is None else Planning(self.planner, self._drafters, policy, clock)
        )

    @property
    def num_requests(self) -> int:
        """Requests waiting and running, and those whose rollouts no step has returned yet."""
        return len(self._served)

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
            if request.request_id in new or request.request_id in self._served:
                raise InvalidInput(
                    f"request id {request.request_id!r} is already being served; ids must be unique"
                )
            new.add(request.request_id)
        joining = [self._starter.start(request) for request in requests]
        with self._change():
            num_slots = self._room.make(requests)
            # What has a slot is never driven out.
            self._scheduler.max_batch_size = max(num_slots, self._scheduler.num_slots)
            self._served.add(joining)

    def abort(self, request_ids: Iterable[str]) -> tuple[Rollout, ...]:
        """End requests now; what each had committed comes back with finish reason `abort`.

        One that had ended in a step that then raised comes back as it ended. Unknown ids are left out.
        """
        served = [each for each in dict.fromkeys(request_ids) if each in self._served]
        with self._change():
            self._served.abort(served)
            self._drop_unless_needed()
        self._tell_drafters(served)
        return self._served.drop_finished(served)

    def release_memory(self) -> None:
        """Give the cache's memory back while nothing runs; the next request takes it again."""
        if self._served.requests:
            raise InvalidInput(f"{self.num_requests} requests are being served: their cache is in use")
        with self._change():
            self._cache.clear()
            if isinstance(self._forwards, RepeatedPolicy):
                self._forwards.release_memory()
            self._room.rows_per_slot = 0

    def forget_prefixes(self) -> None:
        """No text starts from keys and values of one that has ended: benchmarks repeat their prompts."""
        with self._change():
            self._cache.forget()

    def change_weights(self, policy_version: int) -> None:
        """The policy's weights are those of this version, wholly or not at all; no row of others is read.

        A step in flight was queued under others: it is dropped, and decoded again under these.
        """
        with self._change():
            self._drop_in_flight()
            self._served.forget_rows()
            self._forwards.weights_changed()
            self.policy_version = policy_version

    def recompute_cache(self) -> None:
        """The policy's weights have changed: rebuild the keys and values of what runs, forget all others.

        If a forward raises, the next step begins with what is missing.
        """
        with self._change():
            self._drop_in_flight()
            self._served.forget_rows()
            self._admission.write_missing(keeps_proposals=self._planning is None)

    def hold_plan(self, plan: Plan | None) -> None:
        """Decode by this plan from the next step on, those that run too; None: as asked or chosen again."""
        if plan is not None:
            check_plan(plan, self.policy, self._drafters)
        with self._change():
            self._drop_in_flight()
            for running in self._served.requests.values():
                running.proposal = None
            self._held, self.plan = plan, plan or self._asked

    def step(self) -> StepResult:
        """Write the next chunk of what joins, if anything does; decode one step for every request that runs.

        If it raises, nothing is lost: what it had made final comes with the next step, and all else is as it
        was before. Call it again, or abort requests. Where memory runs out it makes nothing final, and fewer
        requests run from the next one on.
        """
        shortage = self._try_step()
        if shortage is not None:
            with self._change():
                self._shrinking.shrink(shortage)
        if not self._served.requests:
            self.check_integrity()
        self._tell_drafters(self._served.finished)
        result = self._served.take()
        self._told = {}
        return result

    def _try_step(self) -> Shortage | None:
        """Run a step; of whom it was, if memory ran out."""
        num_running = 0
        try:
            with self._change():
                num_running, chunk = len(self._scheduler.running), None
                if self._in_flight is None:
                    # Under a planner other plans may have come before one that is preempted runs again.
                    self._admission.write_missing(keeps_proposals=self.planner is None)
                    num_running = len(self._scheduler.running)
                    chunk = self._admission.next()
                if num_running or (chunk is not None and chunk.whole):
                    self._decode_batch(chunk)
                elif chunk is not None:
                    self._admission.write(chunk)
        except (MemoryError, RuntimeError) as error:
            batch = self._served.of((*self._scheduler.running, *self._scheduler.joining))
            if not batch or not is_shortage(error):
                raise
            return shortage_of(error, batch, min(num_running, len(batch)))
        self._shrinking.went_well()
        return None

    def _tell_drafters(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            rollout = self._served.finished[request_id]
            if self._told.get(request_id) is rollout:  # a step that raised behind it told them
                continue
            for drafter in self._drafters.values():
                drafter.finished(rollout)
            self._told[request_id] = rollout

    def check_integrity(self) -> None:
        """Raise AssertionError where requests, slots and cache contradict each other."""
        self._served.check_integrity(is_whole=not self._is_interrupted)
        if self._in_flight is not None and not self._is_interrupted:
            running = self._served.of(self._scheduler.running)
            assert running, "a step is in flight, and nothing runs"
            assert {*running} <= {*self._in_flight.step.batch}, "a request runs beside a step in flight"

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Around all that changes what runs: begins by putting right what an exception left half done."""
        with using(self.kernels.form):
            if self._is_interrupted:
                self._in_flight = None
                self._served.restore()
            self._is_interrupted = True
            yield
            self._is_interrupted = False

    def _decode_batch(self, chunk: Chunk | None) -> None:
        """The step in flight; if there is none, one of those that run and those that a chunk makes whole."""
        if self._in_flight is not None:
            begun = Begun(self._in_flight, self._clock(), self.times.start_s, True)
        else:
            begun = self._begin(chunk)
        step, num_commits = begun.step, len(self._served.commits)
        self._in_flight = self._launched_behind(step)
        self._settle(self._decoder.read(step))
        self._drop_unless_needed()
        seconds = self._clock() - begun.started
        self.times.step_s += seconds
        self.times.num_steps += 1
        if self._planning is not None and begun.is_measured and self._held is None:
            self._planning.observe(
                seconds=seconds,
                start_seconds=self.times.start_s - begun.start_s,
                num_tokens=sum([len(commit.token_ids) for commit in self._served.commits[num_commits:]]),
                is_last=len(self._scheduler.running) < len(step.step.batch),
                is_followed=self._in_flight is not None,
            )

    def _begin(self, chunk: Chunk | None) -> Begun:
        """Choose a plan, write the chunk, and queue a step that follows none."""
        running, joining = self._scheduler.running, self._scheduler.joining
        whole = [] if chunk is None else [joining[place] for place in chunk.whole]
        batch = self._served.of((*running, *whole))
        lengths, first_logits = None, None
        if self._held is not None:
            self._change_plan(self._held, batch)
        elif self._planning is not None:
            choice, choice_s = self._planning.choose(batch, len(whole), has_prefill=chunk is not None)
            self._change_plan(choice.plan, batch)
            lengths = choice.lengths
            self.times.step_s += choice_s
        if chunk is not None:
            is_first = all(each.proposal is None for each in batch)  # some may have been preempted
            num_masks = self._decoder.num_masks_at_start(self.plan) if is_first else None
            first_logits = self._admission.write(chunk, num_masks)
            order = [(*running, *whole).index(request_id) for request_id in self._scheduler.running]
            batch = [batch[place] for place in order]
            lengths = None if lengths is None else [lengths[place] for place in order]
        is_measured = first_logits is None and (chunk is None or not chunk.partial)
        started, start_s = self._clock(), self.times.start_s
        is_observed = self._observers.want_next
        step = self._decoder.launch(batch, self.plan, first_logits, lengths, is_observed=is_observed)
        self._observers.launched()
        return Begun(step, started, start_s, is_measured)

    def _launched_behind(self, step: Launched) -> Launched | None:
        """The next step, queued before this one is read, if nothing between the two needs the host."""
        batch = self._served.of(self._scheduler.running)
        if (
            not self._overlaps
            or step.record is not None
            or self._observers.want_next
            or not (self._planning is None or self._held or self._planning.holds(len(batch)))
            or self._admission.is_needed
            or not may_be_followed(step, batch, self._cache, self._drafters)
        ):
            return None
        if self._planning is not None and self._held is None:
            self._planning.choose(batch, 0)
        self._observers.launched()
        return self._decoder.launch(batch, self.plan, behind=step)

    def _drop_unless_needed(self) -> None:
        """Nobody may be left of a step in flight."""
        if not self._scheduler.running:
            self._drop_in_flight()

    def _drop_in_flight(self) -> None:
        """Nothing of the step in flight counts. It is waited for: what it wrote may not be finite."""
        step, self._in_flight = self._in_flight, None
        if step is not None and step.outcome.read().not_finite:
            self._cache.scrub_all()

    def _change_plan(self, plan: Plan, batch: list[RunningRequest]) -> None:
        """Decode by this plan from now on; proposals of another drafter or another K would not fit it."""
        if (plan.drafter, plan.num_drafts) != (self.plan.drafter, self.plan.num_drafts):
            for running in batch:
                running.proposal = None
        self.plan = plan

    def _settle(self, decoded: Decoded) -> None:
        """Commit what a step has decided for those that still run."""
        batch = self._served.of(self._scheduler.running)
        num_before = [running.num_tokens for running in batch]
        of_batch = decoded.of(batch)
        self._served.commit(
            batch, of_batch, plan=self.plan, version=self.policy_version, planner=self.planner
        )
        if len(decoded.outcome.not_finite) > len(of_batch.outcome.not_finite):
            # The share of a request that had ended: others may have its pages by now, and read them.
            self._drop_in_flight()
            self._cache.scrub_all()
        if decoded.launched.record is not None:
            precision = str(self.policy.kv_shape.dtype).removeprefix("torch.")
            is_last = not self._served.requests
            self._observers.tell(
                decoded.trace(num_before, version=self.policy_version, precision=precision, is_last=is_last)
            )
