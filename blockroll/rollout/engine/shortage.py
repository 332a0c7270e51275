"""What an engine does where memory runs out in a step: fewer requests at once, and what was decoded stays.

The step is undone like any other that raises. Where the forward of a prefill had no room, chunks get half as
many rows, as long as they have more than `LEAST_ROWS`. Otherwise half of the step's batch goes on; the others
wait again, with all that they have. Where only joining requests had no room beside those that run, half of
the joining ones wait. A second shortage in a row, or a request alone, gives the cache's memory back first. A
request that then has no room alone ends with an error; since it was what took the room, the bounds are as
configured again.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from blockroll.errors import BlockrollError, OutOfMemory
from blockroll.policies.base import Policy
from blockroll.rollout.engine.admission import Admission
from blockroll.rollout.engine.budget import size
from blockroll.rollout.engine.cache.contract import Cache
from blockroll.rollout.engine.repeated import RepeatedPolicy
from blockroll.rollout.engine.room import CacheRoom
from blockroll.rollout.engine.running import RunningRequest
from blockroll.rollout.engine.scheduler import Scheduler
from blockroll.rollout.engine.served import ServedRequests

logger = logging.getLogger(__name__)

# What torch's allocators and libraries say, beside the classes of their own for it.
_SAYINGS = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """A step that had no room."""

    batch: tuple[RunningRequest, ...]  # in the order of their slots
    num_running: int  # of them, those that ran before
    reason: str  # what the allocator said


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    is_torch_s = isinstance(error, RuntimeError) and not isinstance(error, BlockrollError)
    return is_torch_s and any(saying in str(error) for saying in _SAYINGS)


class Shrinking:
    """Makes the chunks or the batch of one engine smaller, whenever memory runs out."""

    def __init__(
        self,
        policy: Policy,
        cache: Cache,
        scheduler: Scheduler,
        served: ServedRequests,
        room: CacheRoom,
        admission: Admission,
        *,
        keeps_proposals: bool,
    ) -> None:
        """`keeps_proposals` says that the plan stays, so that drafts of requests that wait still fit it."""
        self._policy, self._cache, self._scheduler, self._served = policy, cache, scheduler, served
        self._room, self._admission, self._keeps_proposals = room, admission, keeps_proposals
        self._max_slots = room.max_slots  # as configured
        self._num_in_a_row = 0
        self._said: set[str] = set()

    def went_well(self) -> None:
        """A step had room."""
        self._num_in_a_row = 0

    def shrink(self, shortage: Shortage) -> None:
        """Go on with smaller chunks or fewer requests. What the step left half done has been put right."""
        batch, num_joining = shortage.batch, len(shortage.batch) - shortage.num_running
        for running in batch:
            running.count_shortage()
        num_begun = self._admission.num_rows_begun
        num_rows = self._admission.shrink_chunks()
        if num_rows:
            self._release()
            self._say(
                "prefill",
                f"memory ran out in a prefill of {num_begun} rows: its chunks have {num_rows} at most from "
                "now on, and no token is lost. Lower prefill_chunk, or memory_fraction, which leaves "
                f"forwards more room. The allocator said: {shortage.reason}",
            )
            return
        self._num_in_a_row += 1
        if len(batch) == 1 and self._num_in_a_row > 1:
            self._end(batch[0], shortage.reason, num_begun)
            self._admission.restore_chunks()
            bound = self._max_slots
        elif num_joining and shortage.num_running:
            bound = shortage.num_running + num_joining // 2
        else:
            bound = max(len(batch) // 2, 1)
        self._room.max_slots = bound
        is_whole = self._cache.num_open == self._scheduler.num_slots
        if self._num_in_a_row > 1 or bound == 1 or not is_whole:
            self._cache.clear()
        num_kept = min(bound, self._cache.num_open)
        while self._scheduler.num_slots > num_kept:
            self._served.preempt(keeps_proposal=self._keeps_proposals)
        num_slots = self._room.num_slots(max(self._room.rows_per_slot, 1))
        self._scheduler.max_batch_size = max(num_slots, self._scheduler.num_slots)
        self._release()
        self._say(
            "step",
            f"memory ran out in a step of {len(batch)} requests, {num_joining} of them joining: at most "
            f"{bound} run together from now on, and no token is lost. Lower max_batch_size, or "
            f"memory_fraction, which leaves forwards more room. The allocator said: {shortage.reason}",
        )

    def _release(self) -> None:
        """Give back what graphs and torch hold unused."""
        if isinstance(self._policy, RepeatedPolicy):
            self._policy.release_memory()
        if self._policy.device.type == "cuda":
            torch.cuda.empty_cache()

    def _end(self, running: RunningRequest, reason: str, num_begun: int) -> None:
        if running.is_running:
            keys = running.num_tokens * self._policy.kv_shape.num_bytes
            step = f"a chunk of {num_begun} rows of its prefill" if num_begun else "a step of it"
            self._served.fail(
                running.request.request_id,
                f"{OutOfMemory.__name__}: {reason}; {step} alone, behind {running.num_tokens} tokens "
                f"(keys and values of {size(keys)}), had no room",
            )

    def _say(self, kind: str, sentence: str) -> None:
        """Once of its kind as a warning."""
        level = logging.INFO if kind in self._said else logging.WARNING
        self._said.add(kind)
        logger.log(level, "%s", sentence)


def shortage_of(error: BaseException, batch: Sequence[RunningRequest], num_running: int) -> Shortage:
    """What is kept of an error that says so: not the error, whose frames hold the memory of the step."""
    reason = " ".join(f"{error}".split()) or type(error).__name__
    return Shortage(batch=tuple(batch), num_running=num_running, reason=reason)
