"""What moves between the parts of blockroll: requests, rollouts, drafts, verdicts, plans and laws.

Shapes: B requests, K drafted tokens, L = K + 1 target positions, V vocabulary, T tokens of one rollout.
Logprobs are natural logarithms.
"""

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from blockroll.errors import InvalidInput

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Law:
    """The distribution tokens are drawn from: 1.0 is the target, below 1 mixed with the draft, None none."""

    weight: float | None = 1.0

    @property
    def name(self) -> str:
        """`target`, `mixed(weight)` or `none`, as recorded in every rollout."""
        if self.weight is None:
            return "none"
        return "target" if self.weight == 1.0 else f"mixed({self.weight:g})"


@dataclass(frozen=True, slots=True)
class Plan:
    """How the next step decodes; one plan per step for the whole batch.

    (0) is plain, (K) is two-forward with K drafts, (K, levels) is fused with one proposal per level.
    """

    num_drafts: int
    levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_drafts < 0:
            raise InvalidInput(f"a plan needs at least 0 drafts, got {self.num_drafts}; 0 is plain decoding")

    @property
    def name(self) -> str:
        """`plain`, `two_forward(K)` or `fused(K,[levels])`."""
        if self.num_drafts == 0:
            return "plain"
        if not self.levels:
            return f"two_forward({self.num_drafts})"
        return f"fused({self.num_drafts},[{','.join(map(str, self.levels))}])"

    @property
    def forwards_per_step(self) -> int:
        """Request-forwards that one step costs."""
        return 2 if self.num_drafts and not self.levels else 1

    @classmethod
    def parse(cls, text: str, *, default_drafts: int) -> "Plan":
        """Read `plain`, `two_forward` (with `default_drafts`) or `two_forward(K)`, after `fixed:` or not."""
        match = re.fullmatch(r"(?:fixed:)?(plain|two_forward)(?:\((\d+)\))?", text.strip())
        if not match or (match[1] == "plain" and match[2]):
            raise InvalidInput(f"plan must be 'plain', 'two_forward' or 'two_forward(K)', got {text!r}")
        if match[1] == "plain":
            return cls(0)
        num_drafts = int(match[2]) if match[2] else default_drafts
        if num_drafts == 0:
            raise InvalidInput(f"plan {text!r} drafts nothing: give K of at least 1, or 'plain'")
        return cls(num_drafts)


PLAIN = Plan(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the tokens of one request are drawn and when it ends."""

    temperature: float = 1.0  # 0 is greedy
    draft_temperature: float | None = None  # None: as temperature; 0: argmax drafts, a point mass
    max_tokens: int = 128
    stop: tuple[str, ...] = ()  # the token that completes a stop string is the last one kept
    stop_token_ids: tuple[int, ...] = ()  # beside the policy's own end tokens
    ignore_eos: bool = False  # go on past the policy's own end tokens (for speed runs)
    law: Law = field(default_factory=Law)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidInput(f"temperature must be at least 0, got {self.temperature}; 0 means greedy")
        if self.draft_temperature is not None and not (
            math.isfinite(self.draft_temperature) and self.draft_temperature >= 0
        ):
            raise InvalidInput(
                f"draft_temperature must be at least 0, got {self.draft_temperature}; "
                "0 means argmax drafts, None means the sampling temperature"
            )
        if self.max_tokens < 1:
            raise InvalidInput(f"max_tokens must be at least 1, got {self.max_tokens}")
        if any(not text for text in self.stop):
            raise InvalidInput(
                "stop strings must not be empty: an empty string would end every rollout at once"
            )
        if self.law.weight != 1.0:
            raise InvalidInput(
                f"law must be the target (weight 1.0), got {self.law.name}; no other sampler exists"
            )

    @property
    def logprob_temperature(self) -> float:
        """The temperature policy log-probabilities are reported at: 1 when greedy."""
        return self.temperature or 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutStats:
    """Counts of one rollout; prefill is excluded."""

    num_forwards: int = 0  # request-forwards: both forwards of two-forward count
    num_verify_steps: int = 0  # steps that checked drafts
    num_drafted: int = 0  # drafts submitted to verify
    num_accepted: int = 0  # accepted drafts that were committed

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
    num_accepted: int  # leading tokens that were drafts; the rest came from the target


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """Proposed tokens and the law they were really drawn from."""

    token_ids_BK: "Tensor"  # int64
    probs_BKV: "Tensor"  # float64; argmax drafts are a point mass


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one step commits: the first num_accepted + 1 tokens of each row."""

    token_ids_BL: "Tensor"  # int64; positions past num_accepted hold no meaning
    num_accepted_B: "Tensor"  # int64, 0..K
    behavior_logprobs_BL: "Tensor"  # float64, log target of each token


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Where one tensor lies in a weight update."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as in safetensors and torch: "float32"
    bucket: int
    offset: int  # bytes from the start of its bucket


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """Ordered tensors of an update and one checksum per bucket."""

    tensors: tuple[TensorSpec, ...]
    bucket_checksums: tuple[str, ...]  # hexadecimal, of each bucket's bytes
    checksum: str  # of the whole: what every replica reports once it serves this version


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """One published policy version. Buckets are byte arrays, or references that a transport resolves."""

    version: int
    base_version: int  # the version it follows
    kind: Literal["full"]
    manifest: WeightManifest
    buckets: tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReceipt:
    """One replica's answer to a weight update."""

    replica_id: int
    accepted: bool
    version: int  # the version the replica holds now
    checksum: str  # recomputed from the weights it holds now
    error: str | None = None  # class and message of the refusal


ReplicaState = Literal["READY", "STALE", "DEAD"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaHealth:
    """What a replica says of itself."""

    version: int
    checksum: str
    num_requests: int  # waiting and running
    num_threads: int  # torch threads of its process
    pid: int
