"""A lock that threads enter in the order they came."""

import threading
from types import TracebackType

from blockroll.errors import InvalidInput


class TurnLock:
    """Held by one thread at a time. InvalidInput if the thread that holds it enters again.

    A plain lock lets the thread that gives it back take it again at once, so that another would wait until a
    whole call is over.
    """

    def __init__(self) -> None:
        self._door = threading.Lock()  # held by the thread whose turn comes next
        self._lock = threading.Lock()
        self._owner: int | None = None

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            raise InvalidInput(
                "the pool was asked from within a call of its own, by a logits processor, a signal handler "
                "or an observer: ask it when that call has returned"
            )
        with self._door:
            self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def leave(self) -> None:
        """Let the next one in."""
        self._owner = None
        self._lock.release()

    def try_enter(self) -> bool:
        """Enter if nobody holds it, without waiting; also where this very thread does."""
        if not self._lock.acquire(blocking=False):
            return False
        self._owner = threading.get_ident()
        return True
