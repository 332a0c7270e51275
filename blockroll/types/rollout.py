"""What is asked, and the finished sample.

Shapes: T tokens of one rollout. Logprobs are natural logarithms.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from blockroll.errors import InvalidInput
from blockroll.types.plan import Law, Plan
from blockroll.types.sampling import Sampling
from blockroll.types.steps import StepCounts

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutStats:
    """Counts of one rollout; its prefill is no forward here."""

    num_prefilled: int = 0  # rows of its prefill that were computed,
    num_reused: int = 0  # and that were taken over from a text with the same beginning
    num_preempted: int = 0  # times that it gave its place up to others, and was prefilled anew
    num_forwards: int = 0  # request-forwards: both forwards of two-forward count
    num_shortages: int = 0  # its steps that were undone, because memory ran out
    steps: StepCounts = ()  # what its other steps did
    # Tokens per second over plain steps', predicted and achieved by all that a planner chose until it ended.
    speedups: tuple[float, float] | None = field(default=None, compare=False)

    @property
    def steps_by_plan(self) -> tuple[tuple[Plan, int], ...]:
        """Each plan that ran, in the order of its first step."""
        counts: dict[Plan, int] = {}
        for step, count in self.steps:
            counts[step.plan] = counts.get(step.plan, 0) + count
        return tuple(counts.items())

    @property
    def num_verify_steps(self) -> int:
        """Steps that checked drafts."""
        return sum(count for step, count in self.steps if step.num_drafts)

    @property
    def num_drafted(self) -> int:
        """Drafts submitted to verify."""
        return sum(count * step.num_drafts for step, count in self.steps)

    @property
    def num_accepted(self) -> int:
        """Accepted drafts that were committed."""
        return sum(count * step.num_accepted for step, count in self.steps)

    @property
    def acceptance_rate(self) -> float:
        """Accepted drafts per draft submitted to verify; NaN if none was."""
        return self.num_accepted / self.num_drafted if self.num_drafted else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """Committed tokens of an interrupted request, with what was recorded for each (columns of length T)."""

    token_ids: tuple[int, ...]
    policy_logprobs: tuple[float, ...]
    behavior_logprobs: tuple[float, ...]
    policy_versions: tuple[int, ...]
    stats: RolloutStats = field(default_factory=RolloutStats)  # its forwards keep the coins going

    def __post_init__(self) -> None:
        lengths = {
            len(column)
            for column in (self.token_ids, self.policy_logprobs, self.behavior_logprobs, self.policy_versions)
        }
        if len(lengths) != 1:
            raise InvalidInput(
                f"every column of a prefix needs one entry per token, got lengths {sorted(lengths)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked of the engine. Equal requests give equal tokens under a fixed plan."""

    request_id: str
    prompt_ids: tuple[int, ...]
    seed: int  # 64 bits; keys every uniform this request consumes
    sampling: Sampling = field(default_factory=Sampling)
    group_id: str | None = None  # rollouts of one prompt share it and are kept on one replica
    prefix: Prefix | None = None  # tokens committed earlier; the request goes on after them
    priority: int = 0  # higher ones join first; it changes no token


class FinishedText(NamedTuple):
    """What a rollout that has finished leaves to histories: token ids alone."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A finished sample. The per-token columns have equal length T."""

    request: Request
    token_ids: tuple[int, ...]  # completion only; an end token is kept
    # Under the causal policy, full vocabulary, at the sampling temperature (1 if greedy).
    policy_logprobs: tuple[float, ...]
    behavior_logprobs: tuple[float, ...]  # law the token was drawn from; 0 when greedy
    policy_versions: tuple[int, ...]
    law: Law
    finish_reason: FinishReason
    stats: RolloutStats
    error: str | None = None  # what went wrong, if finish_reason is "error"

    @property
    def text(self) -> FinishedText:
        """Its tokens, with those of its prompt."""
        return FinishedText(self.request.prompt_ids, self.token_ids)

    @property
    def log_ratio(self) -> float:
        """log pi/mu of the whole rollout: 0 under the target law, up to rounding; NaN if a logprob is."""
        return math.fsum(self.policy_logprobs) - math.fsum(self.behavior_logprobs)

    @property
    def effective_sample_size(self) -> float:
        """Of the token weights w = pi/mu, as a share: (sum w)^2 / (T sum w^2); 1 when all weigh the same.

        NaN without tokens or where a logprob is not finite.
        """
        pairs = zip(self.policy_logprobs, self.behavior_logprobs, strict=True)
        weights = [math.exp(policy - behavior) for policy, behavior in pairs]
        squares = math.fsum(weight * weight for weight in weights)
        return math.fsum(weights) ** 2 / (len(weights) * squares) if squares else math.nan

    def as_prefix(self) -> Prefix:
        """What was committed, to resume the request from: `replace(request, prefix=rollout.as_prefix())`."""
        return Prefix(
            token_ids=self.token_ids,
            policy_logprobs=self.policy_logprobs,
            behavior_logprobs=self.behavior_logprobs,
            policy_versions=self.policy_versions,
            stats=self.stats,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Tokens that one step made final for one request."""

    request_id: str
    token_ids: tuple[int, ...]
    is_draft: tuple[bool, ...]  # per token: an accepted draft, or drawn from the target
