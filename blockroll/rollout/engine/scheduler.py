"""Which request has which slot. Integers and ids only: no tensors, clock or randomness.

A request waits, joins, runs. It joins while its prompt is written, chunk by chunk: it has a slot and is not
decoded. Slots have no holes, and those that run come first:

    0 ..        num_running ..          so many slots
    [ running  )[ joining              )

so that a decoding forward works on one slice of the cache, and a prefill on one behind it. Where one that
runs leaves, the last that runs takes its slot, and the last that joins the slot that this one had.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, takewhile
from typing import NamedTuple

_SLOTS_PER_JOINING = 8  # requests join when one slot in so many is free


class _Slots(NamedTuple):
    ids: tuple[str, ...]  # by slot
    num_running: int


class Scheduler:
    """Higher priorities first, and of one priority first come, first served; `max_batch_size` slots at most.

    Whatever changes slots changes them at once: an interrupt finds all of it as it was, or all of it changed.
    """

    def __init__(self, *, max_batch_size: int) -> None:
        self.max_batch_size = max_batch_size
        self._slots = _Slots((), 0)
        # By priority, each in order of arrival; any may leave at the same cost. After an interrupt some at
        # the front may have slots already.
        self._waiting: dict[int, OrderedDict[str, None]] = {}
        self._ranks: dict[str, tuple[int, int]] = {}  # priority, negative, and arrival; of all there are
        self._num_arrived = 0

    @property
    def running(self) -> tuple[str, ...]:
        """Request ids by slot."""
        ids, num_running = self._slots
        return ids[:num_running]

    @property
    def joining(self) -> tuple[str, ...]:
        """Request ids by slot, from the first one behind those that run."""
        ids, num_running = self._slots
        return ids[num_running:]

    @property
    def num_slots(self) -> int:
        """That some request has."""
        return len(self._slots.ids)

    @property
    def waiting(self) -> tuple[str, ...]:
        """Request ids in the order in which they will join."""
        return tuple(self._queue())

    def submit(self, request_id: str, *, priority: int = 0) -> None:
        """Queue a request."""
        self._num_arrived += 1
        self._ranks[request_id] = (-priority, self._num_arrived)
        self._waiting.setdefault(priority, OrderedDict())[request_id] = None

    def join(self, has_room: Callable[[str], bool] = lambda _: True) -> tuple[str, ...]:
        """Those that wait take free slots, in their order, up to the first that `has_room` says no of."""
        joining = tuple(takewhile(has_room, islice(self._queue(), self.num_admissible)))
        ids, num_running = self._slots
        self._slots = _Slots((*ids, *joining), num_running)
        self._forget_placed()
        return joining

    @property
    def num_admissible(self) -> int:
        """Those that wait and may take slots now, so many at most.

        Few at a time would each cost a forward of their own, so they wait until a share of the slots is free.
        """
        num_free = self.max_batch_size - len(self._slots.ids)
        if num_free <= 0 or not self._waiting:
            return 0
        num_waiting = sum(map(len, self._waiting.values()))
        return num_free if num_free >= min(num_waiting, self.max_batch_size // _SLOTS_PER_JOINING) else 0

    def ranks(self, request_ids: Sequence[str]) -> list[int]:
        """Places of these requests in the order in which they are served: priority, then arrival."""
        return sorted(range(len(request_ids)), key=lambda place: self._ranks[request_ids[place]])

    def arrange(self, start: int, order: Sequence[int]) -> None:
        """The requests in slots start.. stand in this order now, a permutation of their places from there."""
        ids, num_running = self._slots
        moved = ids[start : start + len(order)]
        self._slots = _Slots(
            (*ids[:start], *(moved[place] for place in order), *ids[start + len(order) :]), num_running
        )

    def start(self, num_requests: int) -> None:
        """The first of those that join, so many, run from now on."""
        ids, num_running = self._slots
        self._slots = _Slots(ids, num_running + num_requests)

    def preempt(self, request_id: str) -> int:
        """A request with a slot waits again, before all that came later; which slot it had."""
        # First: an interrupt finds it in both places, where its slot counts.
        self._wait_again(request_id)
        slot = self._vacate(request_id)
        assert slot is not None, f"{request_id!r} has no slot"
        return slot

    def send_back(self, num_kept: int = 0) -> None:
        """Those that join, but for the first so many, wait again, before all that came later."""
        ids, num_running = self._slots
        kept, back = ids[: num_running + num_kept], ids[num_running + num_kept :]
        for place in reversed(self.ranks(back)):
            self._wait_again(back[place])
        self._slots = _Slots(kept, num_running)

    def drop(self, request_id: str) -> int | None:
        """Remove a request; the slot that it had, if it had one."""
        slot = self._vacate(request_id)
        priority = -self._ranks[request_id][0] if request_id in self._ranks else 0
        queue = self._waiting.get(priority, OrderedDict())
        queue.pop(request_id, None)
        if not queue:
            self._waiting.pop(priority, None)
        self._ranks.pop(request_id, None)
        return slot

    def _wait_again(self, request_id: str) -> None:
        queue = self._waiting.setdefault(-self._ranks[request_id][0], OrderedDict())
        queue[request_id] = None
        queue.move_to_end(request_id, last=False)

    def _vacate(self, request_id: str) -> int | None:
        ids, num_running = self._slots
        if request_id not in ids:
            return None
        slot, slots = ids.index(request_id), [*ids]
        if slot < num_running:
            num_running -= 1
            slots[slot], slots[num_running] = slots[num_running], slots[-1]
        else:
            slots[slot] = slots[-1]
        self._slots = _Slots(tuple(slots[:-1]), num_running)
        return slot

    def _queue(self) -> Iterator[str]:
        placed = set(self._slots.ids)
        for priority in sorted(self._waiting, reverse=True):
            yield from (request_id for request_id in self._waiting[priority] if request_id not in placed)

    def _forget_placed(self) -> None:
        """What has a slot waits no more."""
        placed = set(self._slots.ids)
        for priority, queue in tuple(self._waiting.items()):
            while queue and next(iter(queue)) in placed:
                queue.popitem(last=False)
            if not queue:
                del self._waiting[priority]

    def check_integrity(self) -> None:
        """No request twice, no more with slots than there are slots."""
        ids, num_running = self._slots
        everything = [*ids, *self.waiting]
        assert len(everything) == len(set(everything)), f"a request is scheduled twice: {everything}"
        assert self._ranks.keys() == set(everything), "a request is scheduled and has no rank, or the reverse"
        assert 0 <= num_running <= len(ids) <= self.max_batch_size, (
            f"{num_running} run of {len(ids)} in {self.max_batch_size} slots"
        )
