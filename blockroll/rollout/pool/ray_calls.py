"""Calls of one Ray actor: whatever Ray raises comes out as an error that names the replica."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from blockroll.errors import BlockrollError, InvalidInput, ReplicaError, ReplicaFault
from blockroll.rollout.pool.ray_cluster import connection

logger = logging.getLogger(__name__)


class ActorCalls:
    """The methods of one actor, over the connection to Ray that this process had when it was made.

    Every call raises the actor's own error if it is one of blockroll's, ReplicaFault for any other that its
    method raised, and ReplicaError where the actor cannot be reached: it died, it is late, or the connection
    has ended. Without one Ray would start another cluster, in which there is no such actor.
    """

    def __init__(self, replica_id: int, actor: Any) -> None:
        self._actor = actor  # its methods are made at run time
        self._name = f"replica {replica_id}"
        self._connection = connection()

    @property
    def is_connected(self) -> bool:
        """Whether the connection is still the one that it was made over."""
        return self._connection is not None and connection() == self._connection

    def start(self, method: str, *arguments: Any) -> "ray.ObjectRef[Any]":
        """A call under way. InvalidInput for arguments that no other process can be given."""
        with self._named_errors():
            try:
                reference: ray.ObjectRef[Any] = getattr(self._actor, method).remote(*arguments)
            except RayError:
                raise
            except Exception as error:
                if not self.is_connected:
                    raise
                raise InvalidInput(
                    f"what was asked cannot be sent to {self._name}, a process of its own: {error}; give it "
                    "objects that can be pickled, or use backend='local'"
                ) from error
        return reference

    def is_over(self, reference: "ray.ObjectRef[Any]", *, wait_s: float) -> bool:
        """Whether a call has returned; waits so many seconds for it."""
        with self._named_errors():
            return bool(ray.wait([reference], timeout=wait_s)[0])

    def result(self, reference: "ray.ObjectRef[Any]", *, timeout_s: float | None = None) -> Any:
        """What a call returned, or raised; waits for it."""
        with self._named_errors(timeout_s):
            return ray.get(reference, timeout=timeout_s)

    def ask(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        """A call and its result."""
        return self.result(self.start(method, *arguments), timeout_s=timeout_s)

    def kill(self) -> None:
        """End the actor's process, if it still runs."""
        with self._named_errors():
            ray.kill(self._actor)

    @contextmanager
    def _named_errors(self, timeout_s: float | None = None) -> Iterator[None]:
        self._require_connected()
        try:
            yield
        except RayTaskError as failure:  # an instance of its cause's class too
            raise self._of_task(failure) from failure
        except BlockrollError:
            raise
        except RayActorError as death:
            raise ReplicaError(f"{self._name} died: {_in_a_line(death)}") from death
        except GetTimeoutError as late:
            raise ReplicaError(f"{self._name} did not answer within {timeout_s:g} s") from late
        except Exception as error:
            self._require_connected(error)
            if not isinstance(error, RayError):
                raise
            raise ReplicaError(
                f"{self._name} cannot be reached: Ray says {type(error).__name__}: {_in_a_line(error)}"
            ) from error

    def _of_task(self, failure: RayTaskError) -> BlockrollError:
        cause = failure.cause
        if isinstance(cause, BlockrollError):  # itself, and not within the actor's traceback
            return cause
        return ReplicaFault(
            f"{self._name} raised {type(cause).__name__} in its process, which goes on: {cause}; what was "
            "committed is kept: iterate again, or close() the iterator, which gives it back"
        )

    def _require_connected(self, error: Exception | None = None) -> None:
        if not self.is_connected:
            raise ReplicaError(
                f"{self._name} cannot be reached: ray.shutdown() was called in this process while its pool "
                "was in use; make another pool, and close a pool before ray.shutdown()"
            ) from error


def _in_a_line(error: Exception) -> str:
    """What Ray says first; of an actor that was never made also the error, which stands at its end."""
    first, *others = str(error).strip().splitlines() or [""]
    return f"{first} {others[-1].strip()}" if others and "creation task" in first else first
