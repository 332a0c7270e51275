"""What a step leaves behind for those who watch: one record, whatever it is read for.

Audit, acceptance and tests subscribe to an engine (`Engine(observers=...)`); the engine knows none of them.

Shapes: B requests, K drafted tokens, L = K + 1 target positions, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from blockroll.types import Draft, Plan, Request, Rows, Verdict


@dataclass(slots=True)
class EngineTimes:
    """Seconds spent since the last reset, prefill excluded; host time is what is left of the steps.

    A device that works behind the host is waited for once a step: most of its time is in the wait.
    """

    num_steps: int = 0
    step_s: float = 0.0
    forward_s: float = 0.0
    start_s: float = 0.0  # of forward_s: first proposals of a fused plan
    sampler_s: float = 0.0
    wait_s: float = 0.0  # until the host had read what the step decided

    @property
    def host_s(self) -> float:
        """Everything but the policy forward, the sampler and the wait for both."""
        return self.step_s - self.forward_s - self.sampler_s - self.wait_s


class ForwardRows(NamedTuple):
    """Rows of the forward that verified, which its cost depends on."""

    num_requests: int  # B
    width: int  # L: rows of the request that had most
    num_rows: int  # that were computed: B x L, or fewer where they were packed

    @property
    def is_packed(self) -> bool:
        """Whether rows that no request needed were left out."""
        return self.num_rows < self.num_requests * self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrace:
    """Everything the sampler saw and decided in one step; rows in the order of `requests`."""

    requests: Sequence[Request]
    plan: Plan
    version: int  # of the weights
    precision: str  # that forwards multiplied in, as torch names it
    attempts_B: Tensor  # forwards each request had run: a word of every coin
    num_before: Sequence[int]  # tokens of prompt and completion,
    num_kept: Sequence[int]  # and those that the step added
    origins: Sequence[tuple[int, int, int]]  # context, first slot and masks of the draft rows
    forward_rows: ForwardRows
    draft: Draft  # K is that of the step: at most the plan's, where no request has as many
    draft_uniforms_BK: Tensor
    # (B, L), by position or attempt, as the evidence of the parts says; and one column more where the first
    # position was settled by itself.
    verify_uniforms: Tensor
    targets: Sequence[Rows]  # (B, L, V), in the parts that they were verified in
    verdict: Verdict  # of the whole step
    parts: Sequence[tuple[Draft, Verdict]]  # verifications, each behind the tokens of those before
    policy_logprobs_BL: Tensor
    is_last: bool  # nothing is left to decode

    @property
    def request_ids(self) -> tuple[str, ...]:
        """By row."""
        return tuple(request.request_id for request in self.requests)

    @property
    def target_probs_BLV(self) -> Tensor:
        """The law of every position that was verified."""
        return torch.cat([rows.dense() for rows in self.targets], dim=1)

    @property
    def verify_uniforms_BL(self) -> Tensor:
        """Coins of positions; or accept coins, and the uniform of the token behind the accepted drafts."""
        return self.verify_uniforms[:, : self.draft_uniforms_BK.shape[1] + 1]

    @property
    def settle_uniforms_B(self) -> Tensor | None:
        """The uniform that replaces a rejected first draft; None: it was verified with the others.

        By position it decides nothing.
        """
        num_rows = self.draft_uniforms_BK.shape[1] + 1
        return self.verify_uniforms[:, -1] if self.verify_uniforms.shape[1] > num_rows else None


class Observer(Protocol):
    """Is told of every step, in order, when the step is final. It must change nothing of what it is given."""

    def __call__(self, trace: StepTrace, /) -> None:
        """One step of a batch. What it raises comes out of `Engine.step`, whose results are not lost."""
        ...


class Watcher:
    """An observer of one step in so many, and of none in between: what it costs is shared by these."""

    def __init__(self, observer: Observer, *, every: int) -> None:
        self.observer, self.every = observer, every


class Observers:
    """Who is told of which steps. A step that somebody is told of keeps what its trace is made of."""

    def __init__(self, observers: Iterable[Observer | Watcher]) -> None:
        given = tuple(observers)
        self._of_all = tuple(each for each in given if not isinstance(each, Watcher))
        self._of_some = tuple(each for each in given if isinstance(each, Watcher))
        self._num_launched = 0

    @property
    def want_all(self) -> bool:
        """Whether somebody is told of every step."""
        return bool(self._of_all)

    @property
    def want_next(self) -> bool:
        """Whether somebody is told of the step that is launched next."""
        return self.want_all or any(self._num_launched % each.every == 0 for each in self._of_some)

    def launched(self) -> None:
        """A step is."""
        self._num_launched += 1

    def tell(self, trace: StepTrace) -> None:
        """Of the step that was launched last."""
        for observer in self._of_all:
            observer(trace)
        for watcher in self._of_some:
            if (self._num_launched - 1) % watcher.every == 0:
                watcher.observer(trace)
