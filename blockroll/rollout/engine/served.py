"""The requests of an engine, from the queue to the rollout: what each has committed, and in which slot.

A request stands in the queue or in a slot, never in both. What a step has made final is kept here until a
step returns it: an exception on the way loses nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from blockroll.errors import RequestFailed
from blockroll.rollout.engine.cache.contract import Cache
from blockroll.rollout.engine.launched import Decoded
from blockroll.rollout.engine.plans import PlanChooser
from blockroll.rollout.engine.running import RunningRequest
from blockroll.rollout.engine.scheduler import Scheduler
from blockroll.rollout.engine.starting import Starter
from blockroll.types import Commit, Plan, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step made final."""

    commits: tuple[Commit, ...]
    finished: tuple[Rollout, ...]


class ServedRequests:
    """Joins requests, scheduler and cache, so that the three never contradict each other between calls."""

    def __init__(self, scheduler: Scheduler, cache: Cache, starter: Starter) -> None:
        self.requests: dict[str, RunningRequest] = {}
        self.commits: list[Commit] = []
        self.finished: dict[str, Rollout] = {}
        self._scheduler, self._cache, self._starter = scheduler, cache, starter

    def __len__(self) -> int:
        """Those waiting and running, and those whose rollouts no step has returned yet."""
        return len(self.requests) + len(self.finished)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.requests or request_id in self.finished

    def add(self, joining: Iterable[RunningRequest]) -> None:
        """Queue requests."""
        self.requests |= {running.request.request_id: running for running in joining}
        for running in joining:
            self._submit(running)

    def of(self, request_ids: Iterable[str]) -> list[RunningRequest]:
        """The requests of these names."""
        return [self.requests[request_id] for request_id in request_ids]

    def _submit(self, running: RunningRequest) -> None:
        self._scheduler.submit(running.request.request_id, priority=running.request.priority)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests with what each had committed; those that have ended stay as they ended."""
        for request_id in request_ids:
            if request_id in self.requests:
                self.finished[request_id] = self.requests[request_id].rollout()
                self._leave(request_id)

    def drop_finished(self, request_ids: Iterable[str]) -> tuple[Rollout, ...]:
        """Rollouts that no step is to return."""
        dropped = {request_id: self.finished[request_id] for request_id in request_ids}
        rollouts = tuple(dropped.values())
        kept = {name: rollout for name, rollout in self.finished.items() if name not in dropped}
        # No calls from here on: an interrupt loses no rollout.
        self.finished = kept
        return rollouts

    def take(self) -> StepResult:
        """What was made final since the last time."""
        result = StepResult(commits=tuple(self.commits), finished=tuple(reversed(self.finished.values())))
        self.commits, self.finished = [], {}
        return result

    def commit(
        self,
        batch: Sequence[RunningRequest],
        decoded: Decoded,
        *,
        plan: Plan,
        version: int,
        planner: PlanChooser | None,
    ) -> None:
        """Make the tokens of a step final and let finished requests leave."""
        outcome = decoded.outcome
        tokens, failed, committed = outcome.token_ids, outcome.failed, [*outcome.num_committed]
        for slot, (num_before, _) in failed.items():
            committed[slot] = num_before
        # The rows of the anchor and of all new tokens but the last, which is the next anchor.
        rows = [
            (running.anchor, *tokens[slot][: kept - 1]) if kept else ()
            for slot, (running, kept) in enumerate(zip(batch, committed, strict=True))
        ]
        self._cache.commit(0, rows)
        num_commits = len(self.commits)
        for slot in reversed(range(len(batch))):  # from the last slot, so that moves touch none still to come
            running, kept = batch[slot], committed[slot]
            error = None
            try:
                commit = running.commit(
                    tokens[slot][:kept],
                    outcome.is_draft[slot][:kept],
                    outcome.policy_logprobs[slot][:kept],
                    outcome.behavior_logprobs[slot][:kept],
                    version,
                    plan=plan,
                    num_drafts=outcome.num_drafts[slot],
                    level=decoded.levels[slot],
                    proposal=decoded.proposals[slot],
                )
            except RequestFailed as refusal:
                error = f"{RequestFailed.__name__}: {refusal}"
            else:
                # No call: no interrupt comes between the text and what the step says of it.
                self.commits[num_commits:num_commits] = [commit] if kept else []
                if slot in failed and running.is_running:
                    error = failed[slot][1]
            if error is not None:
                running.fail(error)
                if not kept:
                    self._cache.scrub(slot)
            if not running.is_running:
                speedups = planner.speedups if planner is not None else None
                self.finished[running.request.request_id] = running.rollout(speedups)
                self._leave(running.request.request_id)

    def preempt(self, *, keeps_proposal: bool) -> None:
        """What was to be served last of all with slots waits again, and loses nothing but its rows."""
        num_running = len(self._scheduler.running)
        ids = (*self._scheduler.running, *self._scheduler.joining)
        request_id = ids[self._scheduler.ranks(ids)[-1]]
        slot = self._scheduler.preempt(request_id)
        self._vacate(slot, num_running, len(ids))
        self.requests[request_id].count_preemption(keeps_proposal=keeps_proposal)

    def fail(self, request_id: str, error: str) -> None:
        """End a request with what it had committed, and with this error."""
        running = self.requests[request_id]
        running.fail(error)
        self.finished[request_id] = running.rollout()
        self._leave(request_id)

    def _leave(self, request_id: str) -> None:
        """A request is served no more; the rows of its text may be taken over."""
        num_running, num_slots = len(self._scheduler.running), self._scheduler.num_slots
        slot = self._scheduler.drop(request_id)
        if slot is not None:
            if slot < self._cache.num_open:
                self._cache.keep(slot, self.requests[request_id].num_tokens - 1)
            self._vacate(slot, num_running, num_slots)
        del self.requests[request_id]

    def _vacate(self, slot: int, num_running: int, num_slots: int) -> None:
        """Close a slot as the scheduler has done, which had so many slots, so many of them running."""
        if slot >= self._cache.num_open:
            return
        if slot >= num_running:
            self._clean(slot)
        if self._cache.num_open < num_slots:
            self._cache.close(slot)  # slots behind it lack rows: which is whose is settled with these
            return
        if slot < num_running - 1:
            self._cache.exchange(slot, num_running - 1)
        self._cache.release(max(slot, num_running - 1))

    def _clean(self, slot: int) -> None:
        """Let no row of a text that has not been decoded go that is not finite: nobody has seen it yet."""
        has_rows = len(self._cache.tokens(slot)) > 0
        if has_rows and not all(rows.isfinite().all() for rows in self._cache.committed(slot)):
            self._cache.scrub(slot)

    def forget_rows(self) -> None:
        """No row is of use any more: what runs is written anew, and what joins waits again."""
        num_running = len(self._scheduler.running)
        for slot in range(num_running, self._cache.num_open):
            self._clean(slot)
        self._cache.invalidate()
        self._scheduler.send_back()

    def restore(self) -> None:
        """Put right what an exception has left half done.

        Requests say what was committed: all else follows from them. Rows that nobody has found to be finite
        may be anywhere.
        """
        self._cache.repair()
        self._cache.scrub_all()
        for request_id, running in tuple(self.requests.items()):
            if not running.is_running:
                self.finished[request_id] = running.rollout()
            elif request_id not in self.finished:
                self._restart(running)
            if request_id in self.finished:
                self._scheduler.drop(request_id)
                del self.requests[request_id]
        running_ids, joining = self._scheduler.running, self._scheduler.joining
        scheduled = {*running_ids, *joining, *self._scheduler.waiting}
        for request_id, running in self.requests.items():
            if request_id not in scheduled:
                self._submit(running)
        num_running = len(running_ids)
        for slot, request_id in enumerate((*running_ids, *joining)):
            if slot >= self._cache.num_open:
                break
            text = self.requests[request_id].token_ids[:-1]
            self._cache.keep(slot, len(text))
            tokens = tuple(self._cache.tokens(slot))
            if tokens != (text if slot < num_running else text[: len(tokens)]):
                self._cache.close(slot)
                break
        self._cache.close(num_running + len(joining))
        self._scheduler.send_back(max(self._cache.num_open - num_running, 0))

    def _restart(self, running: RunningRequest) -> None:
        """Walk its constraint anew: an interrupt may have stopped it anywhere."""
        try:
            running.restart(self._starter.guide(running.request))
        except Exception as error:  # noqa: BLE001 - what a request brings along ends that request alone
            running.fail(f"{RequestFailed.__name__}: its constraint raised {error!r}")
            self.finished[running.request.request_id] = running.rollout()

    def check_integrity(self, *, is_whole: bool) -> None:
        """Raise AssertionError where requests, slots and cache contradict each other.

        If they are not whole, as behind an exception, only what `restore` builds on is checked.
        """
        self._scheduler.check_integrity()
        running, joining = self._scheduler.running, self._scheduler.joining
        scheduled = {*running, *joining, *self._scheduler.waiting}
        assert self.requests.keys() == scheduled, "a request is nowhere scheduled"
        if not is_whole:
            return
        self._cache.check_integrity()
        num_slots = len(running) + len(joining)
        assert self._cache.num_open == num_slots, f"{self._cache.num_open} slots, not {num_slots}"
        for slot, request_id in enumerate((*running, *joining)):
            tokens, text = tuple(self._cache.tokens(slot)), self.requests[request_id].token_ids[:-1]
            is_held = tokens == (text if slot < len(running) else text[: len(tokens)])
            assert is_held, f"slot {slot} does not hold the text of request {request_id!r}"
