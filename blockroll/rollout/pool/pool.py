"""All replicas behind one `generate`: routing, weight updates, and what happens when a replica fails.

Invariant: a rollout is delivered once, to the call that asked for it; a replica that is not READY at the
pool's version serves nothing.
"""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import nn

from blockroll.errors import InvalidInput, ReplicaError, WeightSyncError
from blockroll.policies.prompts import Messages, OverlongRule, PromptInput, check_messages
from blockroll.rollout.calibration.evidence import Evidence
from blockroll.rollout.engine.requests import check_request
from blockroll.rollout.pool.calls import Member, Rollouts
from blockroll.rollout.pool.group_order import GroupOrder
from blockroll.rollout.pool.histories import load_histories, save_histories
from blockroll.rollout.pool.members import evidence_of, holds, refit
from blockroll.rollout.pool.prompted import as_requests, make_requests
from blockroll.rollout.pool.replica import Replica
from blockroll.rollout.pool.router import Router
from blockroll.rollout.pool.weight_sync import make_update, named_weights, unwrapped
from blockroll.types import (
    Plan,
    ReplicaHealth,
    ReplicaState,
    Request,
    Rollout,
    Sampling,
    UpdateReceipt,
    WeightUpdate,
)
from blockroll.types.names import names_options

logger = logging.getLogger(__name__)

T = TypeVar("T")
Transport = Callable[[WeightUpdate], WeightUpdate]


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
        sampling: Sampling | None = None,
        weights_dtype: torch.dtype | None = None,
        is_joined: bool = False,
        share_history: bool = False,
        sibling_by_sibling: bool = False,
    ) -> None:
        """`requests_per_replica` are handed out at a time; `transport` moves an update's buckets.

        `sampling` is that of requests without one of their own. `sync` casts weights to `weights_dtype`, the
        replicas' own; None: they have the learner's. `is_joined`: another process publishes the weights.
        `share_history` and `sibling_by_sibling` as `share_history` and `group_order` of `RolloutConfig`.
        """
        if not replicas:
            raise InvalidInput("a pool needs at least one replica")
        self._router = Router(
            replicas,
            requests_per_replica=requests_per_replica,
            order=GroupOrder(sibling_by_sibling=sibling_by_sibling),
            share_history=share_history,
        )
        self._members = self._router.members
        self._own = [] if is_joined else self._members  # whose histories this process keeps
        self._transport = transport
        self._on_close = on_close
        self._is_closed = False
        # Devices may differ in memory, and a request may come to any of them.
        self.limits = min((each.limits for each in replicas), key=lambda limits: limits.longest_text)
        self.tokenizer = tokenizer
        self.num_refused_updates = 0
        self.kernels = "; ".join(dict.fromkeys(each.kernels for each in replicas))
        self._sampling = sampling or Sampling()
        self._weights_dtype = weights_dtype
        self._is_joined = is_joined

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str] = "tiny", **options: Any) -> Self:
        """A pool of the policy in a checkpoint folder or on the hub: one replica in this process.

        Options are those of `PolicyConfig` (`dtype`, `device`, `adapter`) and of `RolloutConfig`: `plan`,
        `num_replicas`, `backend`, `audit`, and what requests without a `Sampling` of their own are drawn by,
        as `temperature` or `max_tokens`. InvalidInput, with the nearest name, for an option that there is
        not, and for one that has no effect beside the others.
        """
        from blockroll.rollout.pool.makers import pool_from_options  # they make pools: only this asks them

        pool = pool_from_options(path, options)
        assert isinstance(pool, cls)
        return pool

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def version(self) -> int:
        """Of the weights that READY replicas serve. Who changes weights in place sets it."""
        return self._router.version

    @version.setter
    def version(self, version: int) -> None:
        self._router.version = version

    @property
    def sampling(self) -> Sampling:
        """How requests are drawn that are made without a `Sampling` of their own."""
        return self._sampling

    @property
    def num_redispatched(self) -> int:
        """Requests that went to other replicas, because theirs died or became stale."""
        return self._router.num_redispatched

    @property
    def num_shared_texts(self) -> int:
        """Finished texts that replicas were told of by others, one counted once for each of them."""
        return self._router.num_shared_texts

    @property
    def states(self) -> tuple[ReplicaState, ...]:
        """READY, STALE or DEAD, per replica."""
        return tuple(member.state for member in self._members)

    @names_options("RolloutPool.requests")
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
            sampling or self.sampling,
            seed=seed,
            num_samples=num_samples,
            chat_template_kwargs=chat_template_kwargs,
            overlong_prompts=overlong_prompts,
        )

    @names_options("RolloutPool.chat")
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

    def generate(self, requests: Iterable[Request]) -> Rollouts:
        """The rollouts, as they finish, in any order; all requests are checked before the first starts.

        Calls are separate: each gets its own rollouts, all of them, once, whatever other calls ask under the
        same ids, nested, in turns or in other threads. A group stays on one replica, and goes there again
        while weights stay the same: what it holds of the group's texts is not computed twice. A caller who
        stops early closes the iterator, which gives what was committed; dropping it aborts what still runs.
        An update between two rollouts, or from another thread, is safe: what runs goes on by the new weights.
        ReplicaError if no replica is ready: what was committed stays with the iterator.
        """
        requests = as_requests(requests)
        if len({request.request_id for request in requests}) < len(requests):
            raise InvalidInput("request ids must be unique within one generate call")
        for request in requests:
            check_request(request, self.limits)
        return Rollouts(self._router, self._router.open_call(requests))

    def abort(self) -> tuple[Rollout, ...]:
        """End every call of this pool now: its iterators give nothing more.

        Gives each rollout that was not delivered, call by call, as it was asked: finished ones as they are,
        others with what they had committed and finish reason `abort`.
        """
        return self._router.end_all()

    def sync(self, model: nn.Module) -> tuple[UpdateReceipt, ...]:
        """Publish a learner's weights as the next version: `update` with all of them, in the replicas' dtype.

        The model is the policy's own class, or DDP or `torch.compile` around it. Tied weights are sent once.
        WeightSyncError if no replica takes them; `states` says whether all did. InvalidInput for what is no
        model, or has no weights.
        """
        update = make_update(
            named_weights(unwrapped(model)),
            version=self.version + 1,
            base_version=self.version,
            dtype=self._weights_dtype,
        )
        return self.update(update)

    def update(self, update: WeightUpdate) -> tuple[UpdateReceipt, ...]:
        """Hand a new version to every living replica; one that refuses gets it once more.

        Calls wait meanwhile. If no replica accepts, the old version goes on serving and WeightSyncError is
        raised. If some accept, the others are STALE and serve nothing until an update succeeds: what they had
        in flight goes on elsewhere from its last committed token.
        """
        self._router.require_open()
        if self._is_joined:
            raise InvalidInput(
                "this pool has joined the replicas of another process, which publishes their weights: call "
                "sync or update there"
            )
        sent = self._transport(update) if self._transport else update
        with self._router.alone():
            living = [member for member in self._members if member.state != "DEAD"]
            if not living:
                deaths = "".join(f"; {member.error}" for member in self._members if member.error is not None)
                raise ReplicaError(
                    f"no replica is left to take version {update.version}: all are dead{deaths}"
                )
            receipts = self._send(sent, living)
            with ExitStack() as stack:
                for member in self._members:
                    if member.state != "READY":
                        stack.callback(self._router.empty, member)
        if not any(receipt.accepted for receipt in receipts):
            raise WeightSyncError(
                f"version {update.version} was refused by every replica, "
                f"version {self.version} goes on serving: "
                + "; ".join(f"replica {receipt.replica_id}: {receipt.error}" for receipt in receipts)
            )
        return tuple(receipts)

    def release_memory(self) -> None:
        """Give back what living replicas hold between two `generate` calls: keys and values."""
        self._of_living(lambda replica: replica.release_memory())

    def hold_plan(self, plan: Plan | None) -> None:
        """Decode by this plan on every living replica, from their next steps on; None: as was asked.

        InvalidInput, and nothing changes, where the policy cannot follow it.
        """
        self._of_living(lambda replica: replica.hold_plan(plan))

    def take_evidence(self) -> Evidence:
        """What replicas have bet on their own tokens, and seen of them, since the last call, all added up.

        Empty without `rollout.watch_every`, and where another process has made the replicas. What a replica
        had bet before it died is lost, which biases nothing.
        """
        found = () if self._is_joined else self._of_living(evidence_of)
        return sum(found, Evidence())

    def save_history(self, folder: Path, *, first: int = 0) -> None:
        """Write the texts that drafts are looked up in into a folder, which living replicas can reach.

        Files are numbered from `first`. One that dies meanwhile writes none; of replicas that were joined the
        process that made them does. CheckpointError where a file cannot be written.
        """
        with self._router.alone():
            save_histories(self._own, folder, first)

    def load_history(self, folder: Path, *, first: int = 0) -> None:
        """Go on with what `save_history` wrote there; of fewer files than replicas, several take one.

        Without files replicas keep what they know, and the log says so. CheckpointError where a file is not
        as it was written, InvalidInput where it is of another vocabulary.
        """
        with self._router.alone():
            load_histories(self._own, folder, first)

    def health(self) -> tuple[ReplicaHealth, ...]:
        """What every living replica says of itself."""
        return self._of_living(lambda replica: replica.health())

    def close(self) -> None:
        """Stop every replica, whatever one of them raises; calling it again changes nothing.

        A closed pool serves nothing more (InvalidInput). Its iterators can still be closed, which
        gives back what their calls had committed.
        """
        if self._is_closed:
            return
        self._is_closed = True
        with self._router.alone(), ExitStack() as stack:
            self._router.is_closed = True
            if self._on_close:
                stack.callback(self._on_close)
            for member in self._members:
                stack.callback(member.replica.close)

    def _of_living(self, ask: Callable[[Replica], T]) -> tuple[T, ...]:
        with self._router.alone():
            return tuple(ask(member.replica) for member in self._members if member.state != "DEAD")

    def _send(self, update: WeightUpdate, living: Sequence[Member]) -> list[UpdateReceipt]:
        """Hand an update to the living replicas; their states say afterwards what they hold."""
        before = {member: member.state for member in living}
        for member in living:
            member.state = "STALE"
        try:
            with ThreadPoolExecutor(max_workers=len(living)) as executor:
                answers = list(executor.map(lambda member: refit(member, update), living))
        except BaseException:
            self.version = update.version  # who has it is not known: all are stale until the next one
            self._announce(living)
            raise
        receipts = [answer.receipt for answer in answers]
        self.num_refused_updates += sum(answer.was_refused for answer in answers)
        is_published = any(receipt.accepted for receipt in receipts)
        if is_published:
            self.version = update.version
            self._announce(living)
        for member, receipt in zip(living, receipts, strict=True):
            if member.state == "DEAD":
                continue
            if not is_published:
                member.state = before[member] if receipt.version >= 0 else "STALE"
            elif receipt.accepted and holds(receipt, update):
                member.state = "READY"
            member.error = None
            if member.state == "STALE":
                logger.error(
                    "replica %d is stale at version %d: %s",
                    receipt.replica_id,
                    receipt.version,
                    receipt.error,
                )
        return receipts

    def _announce(self, living: Sequence[Member]) -> None:
        """Tell replicas what was published: one that does not hold it serves no other process either."""
        for member in living:
            if member.state != "DEAD":
                try:
                    member.replica.expect(self.version)
                except ReplicaError as death:
                    member.state, member.error = "DEAD", death
                    logger.error("%s", death)
