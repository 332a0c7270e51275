"""Peers' processes that outlive a task: to start vLLM and let it compile takes a minute or more."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from blockroll.bench.peer import PeerProcess, start_peer
from blockroll.bench.reference import Completion, ReferenceTask


class PeerPool:
    """One process for each peer that was asked for, started when it first is, for one model.

    A process serves every task within the room that was made before it started; a task that needs more, and
    one after a failure, gets a new process. At the beginning of a task a peer forgets all texts so far.
    """

    def __init__(self, *, folder: Path, dtype: str, threads: int, python: Path) -> None:
        self._folder = folder
        self._dtype = dtype
        self._threads = threads
        self._python = python
        self._room: ReferenceTask | None = None
        self._processes: dict[str, PeerProcess] = {}

    def make_room(self, task: ReferenceTask) -> None:
        """Let processes that start from now on be large enough for a task."""
        self._room = task if self._room is None else _widened(self._room, task)

    def reference(self, name: str, task: ReferenceTask) -> "PeerReference":
        """A peer set up for a task; PeerFailed if its process cannot start."""
        self.make_room(task)
        assert self._room is not None
        process = self._processes.get(name)
        if process is not None and (process.has_failed or not _covers(process.limits, task)):
            self._processes.pop(name).close()
            process = None
        if process is None:
            process = self._processes[name] = start_peer(
                name,
                self._room,
                folder=self._folder,
                dtype=self._dtype,
                threads=self._threads,
                python=self._python,
            )
        process.forget()
        return PeerReference(process, task)

    def close(self) -> None:
        """End every process."""
        while self._processes:
            self._processes.popitem()[1].close()


class PeerReference:
    """A peer's process at one task."""

    def __init__(self, process: PeerProcess, task: ReferenceTask) -> None:
        self.version = process.version
        self._process = process
        self._task = task

    def complete(
        self, prompts: Sequence[Sequence[int]], *, seed: int, max_tokens: Sequence[int] | None = None
    ) -> Iterator[Completion]:
        """Decode all prompts together; each completion comes when the peer gives it."""
        yield from self._process.complete(self._task, prompts, seed=seed, max_tokens=max_tokens)

    def cpu_s(self) -> float:
        """Processor time of the peer's process, and of all it has started, in all waves so far."""
        return self._process.cpu_s()

    def close(self) -> None:
        """The process goes on, for the next task."""


def _widened(room: ReferenceTask, task: ReferenceTask) -> ReferenceTask:
    return replace(
        room,
        batch=max(room.batch, task.batch),
        longest_prompt=max(room.longest_prompt, task.longest_prompt),
        max_tokens=max(room.max_tokens, task.max_tokens),
    )


def _covers(limits: ReferenceTask, task: ReferenceTask) -> bool:
    return _widened(limits, task) == limits
