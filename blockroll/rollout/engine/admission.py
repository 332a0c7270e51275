"""How requests come into the batch: first a slot, then their prompts chunk by chunk, then a step.

A request that has a slot and lacks rows *joins*: it is not decoded. Beside requests that run there is one
chunk a step, of at most `prefill_chunk` rows; where nothing runs nobody waits, and memory alone bounds it.
"""

from torch import Tensor

from blockroll.policies.base import Policy
from blockroll.rollout.engine.cache.contract import Cache
from blockroll.rollout.engine.chunks import LEAST_ROWS, Bound
from blockroll.rollout.engine.prefill import Chunk, Prefill, lay_out
from blockroll.rollout.engine.room import CacheRoom, SparePages
from blockroll.rollout.engine.running import RunningRequest
from blockroll.rollout.engine.scheduler import Scheduler
from blockroll.rollout.engine.served import ServedRequests


class Admission:
    """Takes requests from the queue to their first step, in slots of one cache."""

    def __init__(
        self,
        policy: Policy,
        cache: Cache,
        scheduler: Scheduler,
        served: ServedRequests,
        room: CacheRoom,
        *,
        prefill_chunk: int,
        max_prefill_rows: int,
    ) -> None:
        self._cache, self._scheduler, self._served, self._room = cache, scheduler, served, room
        self._prefill = Prefill(policy, cache)
        self._alone = Bound(max_prefill_rows)
        self._beside_others = Bound(min(prefill_chunk, max_prefill_rows))
        self._configured = self._alone, self._beside_others
        self.num_rows_begun = 0  # of the chunk whose forward has begun in this step, and not ended

    def shrink_chunks(self) -> int:
        """Chunks have half as many rows as the one that has begun, at most; how many. 0: they are least."""
        begun, self.num_rows_begun = self.num_rows_begun, 0
        if begun <= LEAST_ROWS:
            return 0
        most = max(begun // 2, LEAST_ROWS)
        self._alone, self._beside_others = self._alone.at_most(most), self._beside_others.at_most(most)
        return most

    def restore_chunks(self) -> None:
        """Chunks have as many rows as configured."""
        self._alone, self._beside_others = self._configured

    def next(self) -> Chunk | None:
        """Give those that wait the slots that are free, and choose the next chunk; None if nobody joins."""
        spare, requests = self._spare(), self._served.requests
        if self._scheduler.join(lambda each: spare.take(requests[each].token_ids)):
            # Growing copies the cache, so it grows by powers of two.
            num_slots = max(1 << (self._scheduler.num_slots - 1).bit_length(), self._cache.num_slots)
            self._cache.reserve(
                num_slots=min(num_slots, self._scheduler.max_batch_size), capacity=self._room.rows_per_slot
            )
        if not self._scheduler.joining:
            return None
        return self._next(len(self._scheduler.running), self._scheduler.joining, self._bound)

    @property
    def is_needed(self) -> bool:
        """Whether rows lack, of requests that have slots or could have them now."""
        if self._cache.num_open < self._scheduler.num_slots or self._scheduler.joining:
            return True
        waiting = self._scheduler.waiting[:1] if self._scheduler.num_admissible else ()
        return any(self._spare().take(self._requests(each).token_ids) for each in waiting)

    def write(self, chunk: Chunk, num_masks: int | None = None) -> Tensor | None:
        """Write a chunk; whose text is whole then runs. `Prefill.write` says what comes of `num_masks`."""
        num_running = len(self._scheduler.running)
        logits = self._write(chunk, self._bound, None if num_running else num_masks)
        self._scheduler.start(len(chunk.whole))
        return logits

    def write_missing(self, *, keeps_proposals: bool) -> None:
        """Rows of running texts that the cache does not hold: weights have changed, or a step raised.

        Before, what arrived last waits again until all others have the pages of a step; one always has.
        """
        while self._scheduler.num_slots > 1 and self._spare().is_short:
            self._served.preempt(keeps_proposal=keeps_proposals)
        self.num_rows_begun = 0
        start, running = self._cache.num_open, self._scheduler.running
        while start < len(running):
            chunk = self._next(start, self._scheduler.running[start:], self._alone)
            self._write(chunk, self._alone)
            start += len(chunk.whole)

    def _spare(self) -> SparePages:
        """Pages that are left behind those of a step, and of all rows that lack."""
        spare, num_open = SparePages(self._cache, self._room.block_rows), self._cache.num_open
        if not self._cache.page_size:
            return spare
        for slot, request_id in enumerate((*self._scheduler.running, *self._scheduler.joining)):
            if slot >= num_open:
                spare.take(self._requests(request_id).token_ids)
            elif slot >= len(self._scheduler.running):
                spare.complete(self._requests(request_id).token_ids, len(self._cache.tokens(slot)))
        return spare

    @property
    def _bound(self) -> Bound:
        return self._beside_others if self._scheduler.running else self._alone

    def _next(self, start: int, request_ids: tuple[str, ...], bound: Bound) -> Chunk:
        texts = [self._requests(request_id).token_ids for request_id in request_ids]
        return self._prefill.next(start, texts, self._scheduler.ranks(request_ids), bound)

    def _write(self, chunk: Chunk, bound: Bound, num_masks: int | None = None) -> Tensor | None:
        layout = lay_out(chunk, bound, num_masks=num_masks)
        # First: where the forward raises, each slot holds rows of the text that the scheduler says.
        self._scheduler.arrange(chunk.start, layout.order)
        self.num_rows_begun = layout.num_forward_rows
        logits = self._prefill.write(layout)
        self.num_rows_begun = 0
        ids = (*self._scheduler.running, *self._scheduler.joining)[chunk.start :]
        for request_id, place in zip(ids, layout.order, strict=False):
            self._requests(request_id).count_prefill(*layout.counts[place])
        return logits

    def _requests(self, request_id: str) -> RunningRequest:
        return self._served.requests[request_id]
