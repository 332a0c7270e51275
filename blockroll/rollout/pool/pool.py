"""All replicas behind one `generate`: routing, weight updates, and what happens when a replica fails.

Invariant: a rollout is delivered once; a replica that is not READY at the pool's version serves nothing.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from blockroll.config import PolicyConfig, RolloutConfig
from blockroll.errors import InvalidInput, ReplicaError, WeightSyncError
from blockroll.policies.loading import load_tokenizer
from blockroll.policies.prompts import Messages, OverlongRule, PromptInput, check_messages
from blockroll.rollout.engine.requests import check_request
from blockroll.rollout.pool.prompted import make_requests
from blockroll.rollout.pool.replica import LocalReplica, Replica
from blockroll.types import (
    ReplicaHealth,
    ReplicaState,
    Request,
    Rollout,
    Sampling,
    UpdateReceipt,
    WeightUpdate,
)

logger = logging.getLogger(__name__)

Transport = Callable[[WeightUpdate], WeightUpdate]


@dataclass(slots=True)
class _Member:
    """A replica as the pool sees it."""

    replica: Replica
    state: ReplicaState = "READY"
    in_flight: dict[str, Request] = field(default_factory=dict)


class RolloutPool:
    """Generates rollouts on one or more replicas that hold the same policy version."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        requests_per_replica: int = 128,
        transport: Transport | None = None,
        on_close: Callable[[], None] | None = None,
        tokenizer: Any = None,
    ) -> None:
        """`requests_per_replica` are handed out at a time; `transport` moves an update's buckets."""
        if not replicas:
            raise InvalidInput("a pool needs at least one replica")
        self._members = [_Member(replica) for replica in replicas]
        self._requests_per_replica = requests_per_replica
        self._transport = transport
        self._on_close = on_close
        self._is_closed = False
        self.limits = replicas[0].limits
        self.tokenizer = tokenizer
        self.version = 0
        self.num_refused_updates = 0
        self.num_redispatched = 0
        self._homes: dict[str, _Member] = {}  # by group: who holds its keys and values
        self._homes_version = 0

    @classmethod
    def from_pretrained(cls, path: str = "tiny", **options: Any) -> Self:
        """A pool of one replica in this process, unless options of `RolloutConfig` say otherwise."""
        config = RolloutConfig(**{"backend": "local", "num_replicas": 1, "threads_per_replica": 1, **options})
        pool = make_pool(PolicyConfig(path=path), config)
        assert isinstance(pool, cls)
        return pool

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def states(self) -> tuple[ReplicaState, ...]:
        """READY, STALE or DEAD, per replica."""
        return tuple(member.state for member in self._members)

    def requests(
        self,
        prompts: PromptInput | Iterable[PromptInput],
        sampling: Sampling | None = None,
        *,
        seed: int = 0,
        num_samples: int = 1,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        overlong_prompts: OverlongRule = "error",
    ) -> list[Request]:
        """Requests for prompts, `num_samples` of each; equal arguments give equal rollouts.

        A prompt is text, token ids or messages (`policies.prompts.encode_prompt`); text, token ids and
        messages that stand alone are one prompt. A prompt that leaves no room for a completion is refused by
        `generate`. With `overlong_prompts` `skip` or `truncate`, one that leaves less room than
        `sampling.max_tokens` is left out, or loses its first tokens; how many were is logged. Request ids
        name the prompt's index and the sample: `{seed}-{index}-{sample}`. InvalidInput for what is no prompt.
        """
        return make_requests(
            self.tokenizer,
            self.limits,
            prompts,
            sampling or Sampling(),
            seed=seed,
            num_samples=num_samples,
            chat_template_kwargs=chat_template_kwargs,
            overlong_prompts=overlong_prompts,
        )

    def chat(
        self,
        messages: Messages,
        sampling: Sampling | None = None,
        *,
        seed: int = 0,
        num_samples: int = 1,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """The assistant's answers to one conversation, as text: `num_samples` of them, in a list.

        Messages are dicts with `role` and `content`. Where the last one is the assistant's, each answer is
        what follows it. `requests` and `generate` give the same as rollouts, with log-probabilities and
        finish reasons. InvalidInput as of `requests`, and where a rollout ended with an error.
        """
        check_messages(messages)
        requests = self.requests(
            [messages],
            sampling,
            seed=seed,
            num_samples=num_samples,
            chat_template_kwargs=chat_template_kwargs,
        )
        answers: dict[str, str] = {}
        for rollout in self.generate(requests):
            if rollout.error is not None:
                raise InvalidInput(f"the conversation could not be answered: {rollout.error}")
            answers[rollout.request.request_id] = self.decode(rollout)
        return [answers[request.request_id] for request in requests]

    def decode(self, rollout: Rollout, *, skip_special_tokens: bool = True) -> str:
        """The completion as text: every token it kept, special ones left out unless asked for.

        The tokens that complete a stop string are kept, and with them the stop string; an end token, or a
        stop string that is a special token, shows only with `skip_special_tokens=False`.
        """
        if self.tokenizer is None:
            raise InvalidInput("this pool has no tokenizer: read `token_ids` of the rollout")
        return str(self.tokenizer.decode(rollout.token_ids, skip_special_tokens=skip_special_tokens))

    def generate(self, requests: Iterable[Request]) -> Iterator[Rollout]:
        """Yield rollouts as they finish, in any order; all requests are checked before the first starts.

        A group stays on one replica, and goes there again while weights stay the same: what it holds of the
        group's texts is not computed twice. If the caller stops early, what still runs is aborted.
        """
        requests = tuple(requests)
        if len({request.request_id for request in requests}) < len(requests):
            raise InvalidInput("request ids must be unique within one generate call")
        for request in requests:
            check_request(request, self.limits)
        return self._generate(requests)

    def _generate(self, requests: tuple[Request, ...]) -> Iterator[Rollout]:
        waiting = deque(_groups(requests))
        if self._homes_version != self.version:
            self._homes_version = self.version
            self._homes.clear()
        try:
            while waiting or any(member.in_flight for member in self._members):
                self._dispatch(waiting)
                for member in self._members:
                    if member.in_flight:
                        yield from self._poll(member, waiting)
        finally:
            for member in self._members:
                if member.in_flight and member.state != "DEAD":
                    member.replica.abort(tuple(member.in_flight))
                member.in_flight.clear()

    def update(self, update: WeightUpdate) -> tuple[UpdateReceipt, ...]:
        """Hand a new version to every living replica; one that refuses gets it once more.

        If none accepts, the old version goes on serving and WeightSyncError is raised. If some accept, the
        others are STALE and serve nothing until an update succeeds.
        """
        sent = self._transport(update) if self._transport else update
        members = [member for member in self._members if member.state != "DEAD"]
        if not members:
            raise ReplicaError(f"no replica is left to take version {update.version}: all are dead")
        with ThreadPoolExecutor(max_workers=len(members)) as executor:
            receipts = list(executor.map(lambda member: self._update_member(member, sent), members))
        if not any(receipt.accepted for receipt in receipts):
            raise WeightSyncError(
                f"version {update.version} was refused by every replica, "
                f"version {self.version} goes on serving: "
                + "; ".join(f"replica {receipt.replica_id}: {receipt.error}" for receipt in receipts)
            )
        self.version = update.version
        for member, receipt in zip(members, receipts, strict=True):
            if member.state == "DEAD":
                continue
            is_current = receipt.version == update.version and receipt.checksum == update.manifest.checksum
            member.state = "READY" if receipt.accepted and is_current else "STALE"
            if member.state == "STALE":
                logger.error(
                    "replica %d is stale at version %d: %s",
                    receipt.replica_id,
                    receipt.version,
                    receipt.error,
                )
        return tuple(receipts)

    def release_memory(self) -> None:
        """Give back what living replicas hold between two `generate` calls: keys and values."""
        for member in self._members:
            if member.state != "DEAD":
                member.replica.release_memory()

    def health(self) -> tuple[ReplicaHealth, ...]:
        """What every living replica says of itself."""
        return tuple(member.replica.health() for member in self._members if member.state != "DEAD")

    def close(self) -> None:
        """Stop every replica; calling it again changes nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        for member in self._members:
            member.replica.close()
        if self._on_close:
            self._on_close()

    def _update_member(self, member: _Member, update: WeightUpdate) -> UpdateReceipt:
        try:
            receipt = member.replica.update(update)
            if not receipt.accepted:
                self.num_refused_updates += 1
                logger.warning("replica %d refused, trying once more: %s", receipt.replica_id, receipt.error)
                receipt = member.replica.update(update)
        except ReplicaError as death:
            member.state = "DEAD"
            logger.error("%s", death)
            receipt = UpdateReceipt(
                replica_id=member.replica.replica_id,
                accepted=False,
                version=-1,
                checksum="",
                error=str(death),
            )
        return receipt

    def _dispatch(self, waiting: deque[list[Request]]) -> None:
        """Hand groups to READY replicas, up to their share: where one was before, or to the least loaded."""
        while waiting:
            ready = [member for member in self._members if member.state == "READY"]
            if not ready:
                raise ReplicaError(f"no replica is ready at version {self.version}; states are {self.states}")
            group_id = waiting[0][0].group_id
            home = self._homes.get(group_id) if group_id is not None else None
            member = min(ready, key=lambda each: len(each.in_flight))
            if home is not None and home.state == "READY" and self._has_room(home, waiting[0]):
                member = home
            elif not self._has_room(member, waiting[0]):
                return
            group = waiting.popleft()
            if group_id is not None:
                self._homes[group_id] = member
            try:
                member.replica.submit(group)
            except ReplicaError as death:
                waiting.appendleft(group)
                self._bury(member, death, waiting)
            else:
                member.in_flight.update((request.request_id, request) for request in group)

    def _has_room(self, member: _Member, group: list[Request]) -> bool:
        return not member.in_flight or len(member.in_flight) + len(group) <= self._requests_per_replica

    def _poll(self, member: _Member, waiting: deque[list[Request]]) -> Iterator[Rollout]:
        try:
            finished = member.replica.poll()
        except ReplicaError as death:
            self._bury(member, death, waiting)
            return
        for rollout in finished:
            del member.in_flight[rollout.request.request_id]
            yield rollout

    def _bury(self, member: _Member, death: ReplicaError, waiting: deque[list[Request]]) -> None:
        """Give a dead replica's requests to the others; their seeds make them the same rollouts."""
        member.state = "DEAD"
        lost = list(member.in_flight.values())
        member.in_flight.clear()
        logger.error("%s; %d requests go to other replicas", death, len(lost))
        self.num_redispatched += len(lost)
        waiting.extendleft(reversed(list(_groups(lost))))


def make_pool(policy: PolicyConfig, config: RolloutConfig) -> RolloutPool:
    """The pool that a config asks for: engines in this process, or Ray actors."""
    if config.backend == "ray":
        from blockroll.rollout.pool.ray_pool import make_ray_pool

        return make_ray_pool(policy, config)
    replicas = [LocalReplica.build(policy, config, replica_id=index) for index in range(config.num_replicas)]
    return RolloutPool(
        replicas,
        requests_per_replica=2 * config.max_batch_size,
        tokenizer=load_tokenizer(policy.path),
    )


def _groups(requests: Iterable[Request]) -> Iterator[list[Request]]:
    """Requests by group, in order of first appearance; a request without a group is one of its own."""
    groups: dict[str, list[Request]] = {}
    for request in requests:
        key = f"group {request.group_id}" if request.group_id is not None else f"request {request.request_id}"
        groups.setdefault(key, []).append(request)
    yield from groups.values()
