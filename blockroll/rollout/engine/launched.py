"""A step that is queued, what it has decided once that is read, and what the step behind it begins with.

Shapes: B running requests, K drafted tokens, L = K + 1 verify rows, N tokens behind the committed text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from blockroll.kernels.rows import Logits
from blockroll.kernels.transfer import send
from blockroll.rollout.engine.cache.contract import Ahead
from blockroll.rollout.engine.drafting import Behind, DraftRows, DraftStep
from blockroll.rollout.engine.outcome import Outcome, Unread
from blockroll.rollout.engine.running import RunningRequest
from blockroll.rollout.engine.trace import ForwardRows, StepTrace
from blockroll.types import Draft, Rows, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A verdict and what it was made from; its cache rows are written, and not committed."""

    verdict: Verdict
    logits: tuple[Logits, ...]  # float32, causal; the rows of one forward, or of two
    targets: tuple[Rows, ...]  # of the same rows
    bad_targets_B: Tensor | None
    bad_anchors_B: Tensor | None = None  # the first target rows, where the forward that drafts has these
    is_empty_BL: Tensor | None  # rows that nothing may follow
    leftover: object  # what the drafter left in the forward that verified
    parts: tuple[tuple[Draft, Verdict], ...]  # the verifications it came from, in order
    forward_rows: ForwardRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a `StepTrace` is made of: rows over the vocabulary, most of the memory that a step takes."""

    draft: Draft
    verified: Verified
    policy_logprobs_BL: Tensor
    draft_uniforms_BK: Tensor
    verify_uniforms: Tensor  # (B, L), and one column more where the first position was settled
    attempts_B: Tensor
    origins: Sequence[tuple[int, int, int]]  # of the draft rows: context, first slot and masks


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """A step all of which is queued. Its requests may leave before it is read: its rows keep their order."""

    step: DraftStep  # with its requests, by row
    given: DraftRows | Draft  # by the drafter; rows without their logits
    verdict: Verdict
    outcome: Unread
    left: object  # what its drafter has left for the next step
    record: Record | None  # None: nobody observes steps

    def rows_of(self, batch: Sequence[RunningRequest]) -> list[int]:
        """The rows of these requests, each of which it has."""
        rows = {running: row for row, running in enumerate(self.step.batch)}
        return [rows[running] for running in batch]


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """What a step needs to know of each request besides the cache, int64."""

    anchors_B: Tensor
    seeds_B: Tensor
    attempts_B: Tensor
    positions_B: Tensor  # of the next token
    between_BN: Tensor  # tokens behind the text that the host has committed; the last one is the anchor
    behind: Behind | None

    @classmethod
    def of(cls, batch: Sequence[RunningRequest], device: torch.device, behind: Launched | None) -> Self:
        """Behind what is committed; or behind a step that is not read, as its verdict says on the device."""
        state_4B = np.array([running.state for running in batch]).T
        if behind is None:
            anchors_B, seeds_B, attempts_B, positions_B = send([state_4B], device)[0].unbind()
            return cls(
                anchors_B=anchors_B,
                seeds_B=seeds_B,
                attempts_B=attempts_B,
                positions_B=positions_B,
                between_BN=anchors_B.new_empty((len(batch), 0)),
                behind=None,
            )
        plan, verdict = behind.step.plan, behind.verdict
        state_4B[0] = behind.rows_of(batch)
        state_4B[2] += plan.forwards_per_step
        rows_B, seeds_B, attempts_B, positions_B = send([state_4B], device)[0].unbind()
        tokens_BL, committed_B = verdict.token_ids_BL[rows_B], verdict.num_committed_B[rows_B]
        return cls(
            anchors_B=tokens_BL.gather(1, committed_B[:, None] - 1)[:, 0],
            seeds_B=seeds_B,
            attempts_B=attempts_B,
            positions_B=positions_B + committed_B,
            between_BN=tokens_BL,
            behind=Behind(rows_B=rows_B, ahead=Ahead(committed_B, plan.most_committed), left=behind.left),
        )


class Begun(NamedTuple):
    """The step of one call of an engine."""

    step: Launched
    started: float  # when it was launched, or this call began
    start_s: float  # of the engine's times, then
    is_measured: bool  # whether no prefill did a part of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """What a step decided for each request, before any of it is a request's own."""

    launched: Launched
    outcome: Outcome
    levels: Sequence[int | None]  # of the proposals that drafts came from, by request; None: of none
    proposals: Sequence[object | None]  # what the drafter keeps for each request; None: nothing

    def of(self, batch: Sequence[RunningRequest]) -> "Decoded":
        """For those of its requests that still run, in this order."""
        rows = self.launched.rows_of(batch)
        if rows == [*range(len(self.launched.step.batch))]:
            return self
        return replace(
            self,
            outcome=self.outcome.of(rows),
            levels=[self.levels[row] for row in rows],
            proposals=[self.proposals[row] for row in rows],
        )

    def trace(
        self,
        num_before: Sequence[int],
        *,
        version: int,
        precision: str,
        is_last: bool,
    ) -> StepTrace:
        """The record of this step, once its tokens are the requests' own; all of them ran until then."""
        launched, record = self.launched, self.launched.record
        assert record is not None, "a step that nobody observes"
        batch = launched.step.batch
        return StepTrace(
            requests=[running.request for running in batch],
            plan=launched.step.plan,
            version=version,
            precision=precision,
            attempts_B=record.attempts_B,
            num_before=num_before,
            num_kept=[running.num_tokens - n for running, n in zip(batch, num_before, strict=True)],
            origins=record.origins,
            forward_rows=record.verified.forward_rows,
            draft=record.draft,
            draft_uniforms_BK=record.draft_uniforms_BK,
            verify_uniforms=record.verify_uniforms,
            targets=record.verified.targets,
            verdict=record.verified.verdict,
            parts=record.verified.parts,
            policy_logprobs_BL=record.policy_logprobs_BL,
            is_last=is_last,
        )
