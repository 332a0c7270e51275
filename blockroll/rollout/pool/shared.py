"""One replica for several clients: pools of other processes that know its name.

Each client has ids of its own and gets its own rollouts; any client's poll lets the replica work for all.
What a client leaves behind is bounded: one that asks nothing for `client_timeout_s` while others do is
forgotten, and its requests end. It is told so when it comes back, and submits them again: their seeds make
them the same.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from blockroll.rollout.pool.calls import free_alias
from blockroll.rollout.pool.replica import Replica
from blockroll.types import Request, Rollout


@dataclass(slots=True)
class _Client:
    """What one client has here."""

    last_asked: float
    requests: dict[str, Request] = field(default_factory=dict)  # as submitted, by alias
    finished: list[Rollout] = field(default_factory=list)


class SharedReplica:
    """Invariant: an alias that the replica serves is one client's, and only that client hears of it."""

    def __init__(
        self, replica: Replica, *, client_timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._replica = replica
        self._client_timeout_s = client_timeout_s
        self._clock = clock
        self._clients: dict[str, _Client] = {}

    def enter(self, name: str) -> None:
        """A client that asks from now on."""
        self._forget_silent_ones()
        self._clients[name] = _Client(last_asked=self._clock())

    def submit(self, requests: Sequence[Request], name: str) -> bool:
        """Queue a client's requests; False, and nothing is queued, if it has been forgotten."""
        client = self._heard(name)
        if client is None:
            return False
        taken = [each.requests for each in self._clients.values()]
        renamed: dict[str, Request] = {}
        for request in requests:
            renamed[free_alias(request.request_id, renamed, *taken)] = request
        self._replica.submit([replace(request, request_id=alias) for alias, request in renamed.items()])
        client.requests.update(renamed)
        return True

    def poll(self, name: str) -> tuple[Rollout, ...] | None:
        """Let the replica work, and give what finished for this client; None if it has been forgotten."""
        client = self._heard(name)
        for rollout in self._replica.poll():
            for each in self._clients.values():
                request = each.requests.pop(rollout.request.request_id, None)
                if request is not None:
                    each.finished.append(_as_submitted(rollout, request))
        if client is None:
            return None
        finished, client.finished = tuple(client.finished), []
        return finished

    def abort(self, request_ids: Sequence[str], name: str) -> tuple[Rollout, ...]:
        """End a client's requests; those that had finished, and what the others had committed."""
        client = self._heard(name)
        if client is None:
            return ()
        ended = set(request_ids)
        finished = [each for each in client.finished if each.request.request_id in ended]
        client.finished = [each for each in client.finished if each.request.request_id not in ended]
        aliases = [alias for alias, request in client.requests.items() if request.request_id in ended]
        aborted = self._replica.abort(aliases)
        left = {alias: client.requests.pop(alias) for alias in aliases}
        return (*finished, *(_as_submitted(each, left[each.request.request_id]) for each in aborted))

    def leave(self, name: str) -> None:
        """End what a client has here, and forget it."""
        client = self._clients.pop(name, None)
        if client is not None and client.requests:
            self._replica.abort(tuple(client.requests))

    def _heard(self, name: str) -> _Client | None:
        client = self._clients.get(name)
        if client is not None:
            client.last_asked = self._clock()
        self._forget_silent_ones()
        return client

    def _forget_silent_ones(self) -> None:
        oldest = self._clock() - self._client_timeout_s
        for name in [name for name, client in self._clients.items() if client.last_asked < oldest]:
            self.leave(name)


def _as_submitted(rollout: Rollout, request: Request) -> Rollout:
    alias, own = repr(rollout.request.request_id), repr(request.request_id)
    return replace(rollout, request=request, error=rollout.error and rollout.error.replace(alias, own))
