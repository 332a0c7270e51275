"""Signals that ask a process to end: Ctrl-C, a scheduler's SIGTERM, a terminal that hangs up.

A signal that the process was started to ignore, as under nohup, stays ignored.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # SIGHUP is not everywhere


class Stopped(KeyboardInterrupt):
    """A signal asks the process to end; what handles Ctrl-C handles it too."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


def exit_code(stop: KeyboardInterrupt) -> int:
    """Of a process that a signal ended, as shells have it: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (stop.signal_number if isinstance(stop, Stopped) else signal.SIGINT)


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Within, each of these signals raises Stopped in the main thread; other threads get none.

    A block that fails after a signal, as when a scheduler sends it to replicas too, ends by the signal, with
    the failure as its cause.
    """
    with _stopped_by(raises_at=1):
        yield


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """The same, but the first signal waits for the end of the block, so that no step is torn apart."""
    with _stopped_by(raises_at=2) as caught:
        yield
    if caught:
        raise Stopped(caught[0])


@contextlib.contextmanager
def _stopped_by(*, raises_at: int) -> Iterator[list[int]]:
    """The numbers of the signals that came; from the one counted `raises_at` on they raise Stopped."""
    caught: list[int] = []

    def note(number: int, frame: object) -> None:
        caught.append(number)
        if len(caught) >= raises_at:
            raise Stopped(number)

    try:
        with _handler(note):
            yield caught
    except KeyboardInterrupt:
        if caught:  # Ray raises a plain one in its place
            raise Stopped(caught[0]) from None
        raise
    except Exception as error:
        if caught:
            raise Stopped(caught[0]) from error
        raise


@contextlib.contextmanager
def _handler(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Have `handler` in place of those that are not told to ignore."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [int(getattr(signal, name)) for name in NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    replaced = {
        number: old for number, old in before.items() if old is not None and old is not signal.SIG_IGN
    }
    for number in replaced:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in replaced.items():
            signal.signal(number, old)
