"""Which replica serves which request of which call.

Invariant: a request of a call is at one replica at most, and a rollout goes to the call that asked for it,
once. A replica that is not READY is given nothing, and what it has in flight goes on elsewhere. One thread at
a time asks the replicas, in turns.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from blockroll.errors import InvalidInput, ReplicaError, StaleReplica
from blockroll.rollout.pool.calls import Call, Member, failed, free_alias, resumed
from blockroll.rollout.pool.group_order import GroupOrder
from blockroll.rollout.pool.replica import Replica
from blockroll.rollout.pool.turns import TurnLock
from blockroll.types import Request, Rollout

logger = logging.getLogger(__name__)

_MOST_HOMES = 4096  # more groups than replicas hold keys and values of


class Router:
    """Hands the requests of calls to replicas, and what these finish to the calls."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        requests_per_replica: int,
        order: GroupOrder | None = None,
        share_history: bool = False,
    ) -> None:
        """`requests_per_replica` of one call are handed to a replica at a time, in `order`.

        With `share_history` what one replica finishes is told to the others.
        """
        self.members = [Member(replica) for replica in replicas]
        self.version = 0
        self.num_redispatched = 0
        self.num_shared_texts = 0  # that replicas were told of: one counts once for each of them
        self.is_closed = False  # nothing is asked of the replicas any more
        self._requests_per_replica = requests_per_replica
        self._order = order or GroupOrder()
        self._shares_history = share_history
        self._lock = TurnLock()
        # Whose each request is, by alias; of nobody: one that could not be aborted when its call ended.
        self._owners: dict[str, Call | None] = {}
        self._dropped: deque[Call] = deque()
        self._homes: dict[str, Member] = {}  # by group: who holds its keys and values, at this version
        self._homes_version = 0

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Only this thread asks replicas, or changes what is known of them and of calls."""
        try:
            with self._lock:
                yield
        finally:
            self._end_dropped()

    def require_open(self) -> None:
        """InvalidInput where the pool was closed."""
        if self.is_closed:
            raise InvalidInput("the pool was closed: nothing serves requests any more; make another one")

    def open_call(self, requests: Iterable[Request]) -> Call:
        """A call of checked requests, none of which has started."""
        with self.alone():
            self.require_open()
            self._ask_anew()
            call = Call.of(requests, self._owners, self._order)
            self._owners.update(dict.fromkeys(call.asked, call))
        return call

    def next_of(self, call: Call) -> Rollout | None:
        """The next rollout of a call; None if there is none left. An error leaves nothing of it running."""
        try:
            while True:
                with self.alone():
                    if not call.arrived and call.asked:
                        self.require_open()
                        self._serve(call)
                    if call.arrived:
                        rollout = call.arrived.popleft()
                        del self._owners[rollout.request.request_id]
                        return call.deliver(rollout)
                    if not call.asked:
                        call.is_over = True
                        return None
        except BaseException:
            with self.alone():
                self._take_back(call)
            raise

    def end_call(self, call: Call) -> tuple[Rollout, ...]:
        """Abort what still runs of a call; all that was not delivered."""
        with self.alone():
            return self._end(call)

    def end_all(self) -> tuple[Rollout, ...]:
        """The same for every call, one after the other."""
        with self.alone():
            calls = dict.fromkeys(call for call in self._owners.values() if call is not None)
            return tuple(rollout for call in calls for rollout in self._end(call))

    def drop_call(self, call: Call) -> None:
        """End a call that nobody holds any more. The collector may say so in the middle of another one."""
        self._dropped.append(call)
        self._end_dropped()

    def empty(self, member: Member, call: Call | None = None) -> None:
        """Take from a replica what is in flight, of one call or of all, to go on from what was committed."""
        aliases = tuple(alias for alias, (owner, _) in member.in_flight.items() if call in (None, owner))
        if not aliases:
            return
        if call is None:
            self.num_redispatched += len(aliases)
        if member.state == "DEAD":
            self._requeue(member, call)
            return
        try:
            self._receive(member, member.replica.abort(aliases))
        except ReplicaError as death:
            self._bury(member, death)
        except BaseException:
            # It may still serve them: their ids stay taken, and what comes of them is nobody's.
            for owner, requests in member.let_all_go(call).items():
                owner.put_back([self._renamed(owner, request) for request in requests])
            raise
        else:
            self._requeue(member, call)  # what it knew nothing of

    def _end_dropped(self) -> None:
        while self._dropped and self._lock.try_enter():
            try:
                self._end(self._dropped.popleft())
            finally:
                self._lock.leave()

    def _end(self, call: Call) -> tuple[Rollout, ...]:
        try:
            self._take_back(call)
        finally:
            for alias in call.asked:
                del self._owners[alias]
            left = call.end()
        return left

    def _take_back(self, call: Call) -> None:
        """Let all that is in flight of a call wait again, on all replicas, whatever one of them raises."""
        with ExitStack() as stack:
            for member in self.members:
                if call.num_on[member]:
                    stack.callback(self.empty, member, call)

    def _serve(self, call: Call) -> None:
        """Hand out what waits, and let the replicas that have something of the call work."""
        for member in self.members:
            if member.state != "READY" and call.num_on[member]:
                self.empty(member)
        self._dispatch(call)
        for member in self.members:
            if call.num_on[member]:
                self._poll(member)

    def _dispatch(self, call: Call) -> None:
        """Hand groups to READY replicas, up to their share: where one was before, or to the least loaded."""
        if self._homes_version != self.version:
            self._homes_version = self.version
            self._homes.clear()
        while call.waiting:
            ready = [member for member in self.members if member.state == "READY"]
            if not ready:
                raise self._none_is_ready()
            group = call.waiting[0]
            roomy = [member for member in ready if self._has_room(member, call, group)]
            if not roomy:
                return
            home = self._homes.get(group[0].group_id) if group[0].group_id is not None else None
            self._submit(
                home
                if home is not None and home in roomy
                else min(roomy, key=lambda each: len(each.in_flight)),
                call,
            )

    def _submit(self, member: Member, call: Call) -> None:
        """Hand the first waiting group to a replica; it waits again if the replica fails.

        What cannot be taken because of what a request brings along ends that request alone, with an error.
        """
        group = call.waiting.popleft()
        self._remember(group[0].group_id, member)
        member.hold(call, group)
        try:
            member.replica.submit(group)
        except StaleReplica as stale:
            self._set_aside(member, stale)
        except ReplicaError as death:
            self._bury(member, death)
        except Exception as error:  # noqa: BLE001 - it becomes the error of the request that brought it about
            for request in group:
                member.let_go(request.request_id)
            if len(group) == 1:
                call.arrived.append(failed(group[0], error))
            else:
                call.waiting.extendleft([request] for request in reversed(group))

    def _remember(self, group_id: str | None, member: Member) -> None:
        """Where a group is now; of those that nobody has asked for longest, nothing."""
        if group_id is None:
            return
        self._homes.pop(group_id, None)
        self._homes[group_id] = member
        if len(self._homes) > _MOST_HOMES:
            del self._homes[next(iter(self._homes))]

    def _none_is_ready(self) -> ReplicaError:
        """What to raise; replicas that were stale by their own word are asked anew by the next call."""
        states = tuple(member.state for member in self.members)
        reasons = "".join(f"; {member.error}" for member in self.members if member.error is not None)
        self._ask_anew()
        advice = "go on iterating after an update that succeeds, or close() the iterator, which gives it back"
        if all(state == "DEAD" for state in states):
            advice = "close() the iterator, which gives it back, and make another pool"
        return ReplicaError(
            f"no replica is ready at version {self.version}; states are {states}{reasons}; "
            f"what was committed is kept: {advice}"
        )

    def _ask_anew(self) -> None:
        """Another process may have updated replicas that said they were stale: they say so again if not."""
        for member in self.members:
            if member.state == "STALE" and member.error is not None:
                member.state, member.error = "READY", None

    def _set_aside(self, member: Member, stale: StaleReplica) -> None:
        """A replica that serves nothing for now: what it has goes on elsewhere."""
        member.state, member.error = "STALE", stale
        logger.error("%s", stale)
        self.empty(member)

    def _has_room(self, member: Member, call: Call, group: list[Request]) -> bool:
        """What other calls have there does not count: they may never be asked for it."""
        num_held = call.num_on[member]
        return not num_held or num_held + len(group) <= self._requests_per_replica

    def _poll(self, member: Member) -> None:
        """Let a replica work, and give what finished to the calls it belongs to."""
        try:
            finished = member.replica.poll()
        except StaleReplica as stale:
            self._set_aside(member, stale)
        except ReplicaError as death:
            self._bury(member, death)
        except BaseException:  # what it still has, of any call, is not known
            self.empty(member)
            raise
        else:
            self._receive(member, finished)

    def _receive(self, member: Member, rollouts: Sequence[Rollout]) -> None:
        """Give rollouts to their calls; one that was interrupted goes on from its last committed token."""
        unfinished: dict[Call, list[Request]] = {}
        for rollout in rollouts:
            alias = rollout.request.request_id
            held = member.let_go(alias)
            if held is None:
                if self._owners.get(alias, held) is None:  # it could not be aborted when its call ended
                    self._owners.pop(alias, None)
            elif rollout.finish_reason == "abort":
                unfinished.setdefault(held[0], []).append(resumed(rollout))
            else:
                held[0].arrived.append(rollout)
        for call, requests in unfinished.items():
            call.put_back(requests)
        self._share(member, rollouts)

    def _share(self, member: Member, rollouts: Sequence[Rollout]) -> None:
        """Tell the other replicas of texts that this one has finished."""
        texts = [each.text for each in rollouts if each.finish_reason in ("stop", "length")]
        if not self._shares_history or not texts:
            return
        for other in self.members:
            if other is not member and other.state != "DEAD":
                other.replica.tell_history(texts)
                self.num_shared_texts += len(texts)

    def _renamed(self, call: Call, request: Request) -> Request:
        """The request under a new alias; the old one stays taken, by nobody."""
        alias = free_alias(request.request_id, self._owners)
        self._owners[request.request_id], self._owners[alias] = None, call
        return call.rename(request, alias)

    def _requeue(self, member: Member, call: Call | None = None) -> int:
        """Let requests wait again as they were submitted; their seeds make them the same rollouts."""
        released = member.let_all_go(call)
        for owner, requests in released.items():
            owner.put_back(requests)
        return sum(map(len, released.values()))

    def _bury(self, member: Member, death: ReplicaError) -> None:
        """Give a dead replica's requests to the others."""
        member.state, member.error = "DEAD", death
        num_lost = self._requeue(member)
        logger.error("%s; %d requests go to other replicas", death, num_lost)
        self.num_redispatched += num_lost
