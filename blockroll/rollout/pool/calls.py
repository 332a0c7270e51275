"""One `generate` call: what it asks, where its requests are, and the iterator that its caller holds.

Ids are unique only within a call. While another call has a request of the same id in the pool, a request is
served under an alias; what is delivered bears the request as it was asked.
"""

import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Protocol, Self

from blockroll.errors import BlockrollError, ReplicaError, RequestFailed
from blockroll.rollout.pool.group_order import GroupOrder, groups
from blockroll.rollout.pool.replica import Replica
from blockroll.types import Prefix, ReplicaState, Request, Rollout, RolloutStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request as its caller made it, and its place in the call."""

    place: int
    request: Request


@dataclass(slots=True, eq=False)
class Call:
    """Invariant: each request that is not delivered is either waiting, in flight or arrived."""

    asked: dict[str, Asked]  # not delivered, by alias
    # Groups, or siblings one by one, under their aliases, from their last committed tokens.
    waiting: deque[list[Request]]
    arrived: deque[Rollout] = field(default_factory=deque)  # finished, under their aliases
    num_on: Counter["Member"] = field(default_factory=Counter)  # in flight, per replica
    is_over: bool = False

    @classmethod
    def of(cls, requests: Iterable[Request], taken: Collection[str], order: GroupOrder) -> Self:
        """A call whose aliases are none of those taken."""
        asked: dict[str, Asked] = {}
        for place, request in enumerate(requests):
            alias = free_alias(request.request_id, taken, asked)
            asked[alias] = Asked(place=place, request=request)
        renamed = (replace(each.request, request_id=alias) for alias, each in asked.items())
        return cls(asked=asked, waiting=order.waiting(renamed))

    def put_back(self, requests: Iterable[Request]) -> None:
        """Let requests wait again, before all others."""
        self.waiting.extendleft(reversed(list(groups(requests))))

    def rename(self, request: Request, alias: str) -> Request:
        """The same request under another alias."""
        self.asked[alias] = self.asked.pop(request.request_id)
        return replace(request, request_id=alias)

    def deliver(self, rollout: Rollout) -> Rollout:
        """A rollout with the request as it was asked; it is delivered from now on."""
        asked = self.asked.pop(rollout.request.request_id)
        error = rollout.error and rollout.error.replace(
            repr(rollout.request.request_id), repr(asked.request.request_id)
        )
        return replace(rollout, request=asked.request, error=error)

    def end(self) -> tuple[Rollout, ...]:
        """All that was not delivered, in the order it was asked: finished, or what was committed of it."""
        left = [*self.arrived, *(interrupted(request) for group in self.waiting for request in group)]
        left.sort(key=lambda rollout: self.asked[rollout.request.request_id].place)
        self.arrived.clear()
        self.waiting.clear()
        self.is_over = True
        return tuple(self.deliver(rollout) for rollout in left)


@dataclass(slots=True, eq=False)
class Member:
    """A replica as the pool sees it."""

    replica: Replica
    state: ReplicaState = "READY"
    # The error that says why it is DEAD, or STALE by its own word: the pool that publishes may be another's.
    error: ReplicaError | None = None
    in_flight: dict[str, tuple[Call, Request]] = field(default_factory=dict)  # by alias

    def hold(self, call: Call, requests: Iterable[Request]) -> None:
        """These requests of a call are its replica's now."""
        for request in requests:
            self.in_flight[request.request_id] = (call, request)
            call.num_on[self] += 1

    def let_go(self, alias: str) -> tuple[Call, Request] | None:
        """Whose request it was and how it was submitted; None if the replica has no such request."""
        held = self.in_flight.pop(alias, None)
        if held is not None:
            held[0].num_on[self] -= 1
        return held

    def let_all_go(self, call: Call | None = None) -> dict[Call, list[Request]]:
        """Every request in flight, or every one of this call, as submitted."""
        mine = [alias for alias, (owner, _) in self.in_flight.items() if call in (None, owner)]
        released: dict[Call, list[Request]] = {}
        for alias in mine:
            held = self.let_go(alias)
            if held is not None:
                released.setdefault(held[0], []).append(held[1])
        return released


class _Server(Protocol):
    """What an iterator needs of the pool."""

    def next_of(self, call: Call) -> Rollout | None:
        """The next rollout of the call; None if there is none left."""
        ...

    def end_call(self, call: Call) -> tuple[Rollout, ...]:
        """Abort what still runs of the call; all that was not delivered."""
        ...

    def drop_call(self, call: Call) -> None:
        """The same for a call that nobody holds any more, whatever this thread is doing."""
        ...


class Rollouts(Iterator[Rollout]):
    """The rollouts of one `generate` call, as they finish, in any order.

    Each is given once. An error leaves what was committed with the call: iterating goes on from there, and
    `close` gives it back. An iterator that is dropped aborts what still runs of its call, and no other.
    """

    def __init__(self, server: _Server, call: Call) -> None:
        self._server, self._call = server, call

    def __next__(self) -> Rollout:
        rollout = self._server.next_of(self._call)
        if rollout is None:
            raise StopIteration
        return rollout

    def close(self) -> tuple[Rollout, ...]:
        """End the call. Gives each rollout that was not delivered, in the order it was asked.

        What had not finished has what it had committed, and finish reason `abort`. Closing again gives none.
        """
        return self._server.end_call(self._call)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not self._call.is_over and not is_finalizing():
            self._server.drop_call(self._call)


def free_alias(request_id: str, *taken: Collection[str]) -> str:
    """The id itself, or with a number behind it that nobody has."""
    alias, number = request_id, 1
    while any(alias in each for each in taken):
        number += 1
        alias = f"{request_id}~{number}"
    return alias


def resumed(rollout: Rollout) -> Request:
    """The request of an interrupted rollout, to go on from its last committed token."""
    if not rollout.token_ids:
        return rollout.request
    return replace(rollout.request, prefix=rollout.as_prefix())


def failed(request: Request, error: Exception) -> Rollout:
    """What a request has committed that no replica can take, because of what it brings along."""
    said = (
        f"{type(error).__name__}: {error}"
        if isinstance(error, BlockrollError)
        else f"{RequestFailed.__name__}: it cannot be started: {error!r} for request {request.request_id!r}"
    )
    return replace(interrupted(request), finish_reason="error", error=said)


def interrupted(request: Request) -> Rollout:
    """What a request that does not run has committed so far."""
    prefix = request.prefix or Prefix(
        token_ids=(), policy_logprobs=(), behavior_logprobs=(), policy_versions=(), stats=RolloutStats()
    )
    return Rollout(
        request=request,
        token_ids=prefix.token_ids,
        policy_logprobs=prefix.policy_logprobs,
        behavior_logprobs=prefix.behavior_logprobs,
        policy_versions=prefix.policy_versions,
        law=request.sampling.law,
        finish_reason="abort",
        stats=prefix.stats,
    )
