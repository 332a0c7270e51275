"""Which request runs in which slot. Integers and ids only: no tensors, clock or randomness.

Running requests occupy slots 0..n-1 without holes, so that every forward works on one slice of the
cache: when a request leaves, the last one moves into its slot.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

MAX_PREFILL_TOKENS = 16384  # padded prompt tokens of one prefill, where one request has no more alone
_SLOTS_PER_JOINING = 8  # requests join when one slot in so many is free


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A running request changes its slot."""

    source: int
    target: int


class Scheduler:
    """First come, first served, into at most `max_batch_size` slots."""

    def __init__(self, *, max_batch_size: int, max_prefill_tokens: int = MAX_PREFILL_TOKENS) -> None:
        """`max_prefill_tokens` bounds the padded prompt tokens of one prefill; one request always fits."""
        self.max_batch_size = max_batch_size
        self.max_prefill_tokens = max_prefill_tokens
        # Tokens by id, in order of arrival; any may leave at the same cost. After an interrupt the first may
        # be such as run already.
        self._waiting: OrderedDict[str, int] = OrderedDict()
        self._running: list[str] = []

    @property
    def running(self) -> tuple[str, ...]:
        """Request ids by slot."""
        return tuple(self._running)

    @property
    def waiting(self) -> tuple[str, ...]:
        """Request ids in order of arrival."""
        running = set(self._running)
        return tuple(request_id for request_id in self._waiting if request_id not in running)

    def submit(self, request_id: str, num_tokens: int) -> None:
        """Queue a request whose prefill has `num_tokens` tokens."""
        self._waiting[request_id] = num_tokens

    def joining(self, has_room: Callable[[str], bool] = lambda _: True) -> tuple[str, ...]:
        """Waiting requests that fit behind the running ones now, in slot order; they go on waiting.

        The first that `has_room` says no of, and those behind it, do not fit.

        Few at a time would each cost a forward of their own, so they wait until a share of the slots is free.
        """
        self._forget_admitted()
        num_free = self.max_batch_size - len(self._running)
        if num_free < min(len(self._waiting), self.max_batch_size // _SLOTS_PER_JOINING):
            return ()
        joining: list[str] = []
        widest = 0
        for request_id, num_tokens in islice(self._waiting.items(), max(num_free, 0)):
            widest = max(widest, num_tokens)
            if joining and widest * (len(joining) + 1) > self.max_prefill_tokens:
                break
            if not has_room(request_id):
                break
            joining.append(request_id)
        return tuple(joining)

    def admit(self, joining: Sequence[str] | None = None) -> tuple[str, ...]:
        """Those that join run from now on, in the slots behind the running ones; None: all that may."""
        joining = self.joining() if joining is None else tuple(joining)
        self._running = [*self._running, *joining]  # at once: an interrupt finds all of them, or none
        self._forget_admitted()
        return joining

    def _forget_admitted(self) -> None:
        """What runs waits no more."""
        while self._waiting and next(iter(self._waiting)) in self._running:
            self._waiting.popitem(last=False)

    def preempt(self, request_id: str, num_tokens: int) -> int:
        """A running request waits again, before all others; the last one has the slot that it ran in."""
        # First: an interrupt finds it in both places, where it counts as running.
        self._waiting[request_id] = num_tokens
        self._waiting.move_to_end(request_id, last=False)
        slot = self._running.index(request_id)
        self.release(slot)
        return slot

    def release(self, slot: int) -> Move | None:
        """Free a slot; the move that closes the hole, if there is one."""
        last = len(self._running) - 1
        running = self._running[:last]
        if slot != last:
            running[slot] = self._running[last]
        self._running = running
        return None if slot == last else Move(source=last, target=slot)

    def drop(self, request_id: str) -> int | None:
        """Remove a request, waiting or running; the slot it ran in, which the last one now has, if it ran."""
        self._waiting.pop(request_id, None)
        if request_id not in self._running:
            return None
        slot = self._running.index(request_id)
        self.release(slot)
        return slot

    def check_integrity(self) -> None:
        """No request twice, no more running than slots."""
        ids = [*self._running, *self.waiting]
        assert len(ids) == len(set(ids)), f"a request is scheduled twice: {ids}"
        assert len(self._running) <= self.max_batch_size, (
            f"{len(self._running)} run in {self.max_batch_size} slots"
        )
