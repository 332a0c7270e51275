"""What moves between the parts of blockroll: requests, rollouts, drafts, verdicts, plans and laws.

Shapes: B requests, K drafted tokens, L = K + 1 target positions, V vocabulary, T tokens of one rollout.
Logprobs are natural logarithms.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from blockroll.errors import InvalidInput

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "abort", "error"]
LogitsProcessor = Callable[["Tensor", "Tensor"], "Tensor"]


@dataclass(frozen=True, slots=True)
class Law:
    """The distribution tokens are drawn from: 1.0 is the target, below 1 mixed with the draft, None none."""

    weight: float | None = 1.0

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 <= self.weight <= 1:
            raise InvalidInput(
                f"the weight of a law must be between 0 and 1, got {self.weight}; 1 is the target "
                "(lossless), 0 the draft's own law"
            )

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
        if self.levels and (
            list(self.levels) != sorted(set(self.levels))
            or self.levels[0] != 0
            or self.levels[-1] > self.num_drafts
        ):
            raise InvalidInput(
                f"the levels of a fused plan must rise from 0 to at most K = {self.num_drafts}, got "
                f"{list(self.levels)}; without level 0 a step that accepts nothing has no drafts after it"
            )

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

    @property
    def layout(self) -> str | None:
        """What a policy must have been trained to draft for: `two_forward`, `fused`, or None for plain."""
        if self.num_drafts == 0:
            return None
        return "fused" if self.levels else "two_forward"

    @property
    def rows_per_forward(self) -> int:
        """New rows of one request in the widest forward of a step."""
        return (self.num_drafts + 1) * (len(self.levels) + 1)

    @classmethod
    def parse(cls, text: str, *, default_drafts: int) -> "Plan":
        """Read `plain`, `two_forward`, `two_forward(K)`, `fused`, `fused(K)` or `fused(K,[levels])`.

        `fixed:` may stand before it. Without K it is `default_drafts`; without levels they are 0 and K.
        """
        match = _PLAN.fullmatch(text.replace(" ", ""))
        if not match or (match["kind"] == "plain" and match["drafts"]):
            raise InvalidInput(
                "plan must be 'plain', 'two_forward', 'two_forward(K)', 'fused', 'fused(K)' or "
                f"'fused(K,[0,...])', got {text!r}"
            )
        if match["kind"] == "plain":
            return cls(0)
        num_drafts = int(match["drafts"] or default_drafts)
        if num_drafts == 0:
            raise InvalidInput(f"plan {text!r} drafts nothing: give K of at least 1, or 'plain'")
        if match["kind"] == "two_forward":
            if match["levels"]:
                raise InvalidInput(f"plan {text!r} has levels, which only fused plans have")
            return cls(num_drafts)
        levels = match["levels"]
        return cls(num_drafts, tuple(map(int, levels.split(","))) if levels else (0, num_drafts))


_PLAN = re.compile(
    r"(?:fixed:)?(?P<kind>plain|two_forward|fused)(?:\((?P<drafts>\d+)(?:,\[(?P<levels>\d+(?:,\d+)*)\])?\))?"
)
PLAIN = Plan(0)


class Guide(Protocol):
    """Where one completion stands in its constraint."""

    def allowed(self, drafts: Sequence[int], first: int) -> "Tensor":
        """What may follow the tokens so far and the first `first`, `first + 1`, ... of `drafts`: bool (N, V).

        A row for each, up to all of them; fewer where a draft is itself not allowed. Nothing moves.
        """
        ...

    def advance(self, token_ids: Sequence[int]) -> None:
        """These tokens were committed."""
        ...


class Constraint(Protocol):
    """A set of completions, by the tokens that may follow each prefix."""

    def start(self, vocab_size: int, tokenizer: Any, end_token_ids: frozenset[int]) -> Guide:
        """A guide before the first token. InvalidInput where nothing satisfies the constraint."""
        ...


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
    # Truncation, of the law at the temperature; in this order, as transformers does.
    top_k: int = 0  # this many best tokens stay, of equals those of lowest id; 0 keeps all
    top_p: float = 1.0  # the fewest best tokens that hold this mass stay
    min_p: float = 0.0  # tokens at least this share as likely as the best stay
    # Edits of the logits, before the temperature; counts take in accepted drafts.
    repetition_penalty: float = 1.0  # divides logits of tokens in the text, multiplies negative ones
    presence_penalty: float = 0.0  # taken from the logit of a token that the completion holds,
    frequency_penalty: float = 0.0  # and this for each time it does
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # added, by token id
    min_tokens: int = 0  # no end token before
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # sequences that are never completed
    # Called as transformers calls them: ids (1, T), scores (1, V) of one row; state of their own is refused.
    logits_processors: tuple[LogitsProcessor, ...] = ()
    constraint: "Constraint | None" = None  # what every prefix of the completion must satisfy
    allow_truncated_mix: bool = False  # a mixed law without full support cannot be corrected: ask by name

    def __post_init__(self) -> None:
        self._check_processing()
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
        if self.law.weight is None:
            raise InvalidInput("law must be the target or mixed, got none; no sampler draws without a law")
        if self.law.weight < 1 and self.temperature == 0:
            raise InvalidInput(
                f"law {self.law.name} has no greedy form: give a temperature above 0, or the target law "
                "(weight 1)"
            )

    def _check_processing(self) -> None:
        for name, is_allowed, allowed in (
            ("top_k", self.top_k >= 0, "at least 0; 0 keeps every token"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1; 1 keeps every token"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1; 0 keeps every token"),
            (
                "repetition_penalty",
                math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
                "above 0; 1 changes nothing",
            ),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a finite number; 0 changes nothing"),
            (
                "frequency_penalty",
                math.isfinite(self.frequency_penalty),
                "a finite number; 0 changes nothing",
            ),
            (
                "logit_bias",
                all(math.isfinite(bias) or bias == -math.inf for bias in self.logit_bias.values()),
                "a finite number or -inf for each token id",
            ),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"0 to max_tokens = {self.max_tokens}"),
            ("bad_words_ids", all(self.bad_words_ids), "sequences of at least one token id"),
        ):
            if not is_allowed:
                raise InvalidInput(f"{name} must be {allowed}; got {getattr(self, name)}")
        if self.law.name.startswith("mixed") and self.is_truncated and not self.allow_truncated_mix:
            raise InvalidInput(
                f"law {self.law.name} together with truncation or masks leaves nothing that pi/mu could "
                "correct: some tokens are never drawn; drop one of them, or set allow_truncated_mix=True if "
                "nothing is to be corrected"
            )

    @property
    def is_truncated(self) -> bool:
        """Whether tokens that the policy could draw are never drawn: pi/mu then averages to less than 1."""
        return bool(
            self.top_k
            or self.top_p < 1
            or self.min_p
            or self.min_tokens
            or self.bad_words_ids
            or self.logits_processors
            or self.constraint is not None
            or any(bias == -math.inf for bias in self.logit_bias.values())
        )

    @property
    def is_processed(self) -> bool:
        """Whether tokens are drawn from anything but softmax(logits / temperature)."""
        return (
            self.is_truncated
            or bool(self.logit_bias)
            or self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @property
    def is_policy(self) -> bool:
        """Whether tokens are drawn from the policy itself: softmax(logits / temperature), unmixed."""
        return not self.is_processed and self.temperature > 0 and self.law.weight == 1

    @property
    def logprob_temperature(self) -> float:
        """The temperature policy log-probabilities are reported at: 1 when greedy."""
        return self.temperature or 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutStats:
    """Counts of one rollout; its prefill is no forward here."""

    num_prefilled: int = 0  # rows of its prefill that were computed,
    num_reused: int = 0  # and that were taken over from a text with the same beginning
    num_forwards: int = 0  # request-forwards: both forwards of two-forward count
    num_verify_steps: int = 0  # steps that checked drafts
    num_drafted: int = 0  # drafts submitted to verify
    num_accepted: int = 0  # accepted drafts that were committed
    steps_by_plan: tuple[tuple[Plan, int], ...] = ()  # each plan that ran, in the order of its first step

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """Proposed tokens and the law they were really drawn from."""

    token_ids_BK: "Tensor"  # int64; behind a request's number of drafts they hold no meaning
    probs_BKV: "Tensor"  # float64; argmax drafts are a point mass
    num_drafts_B: "Tensor"  # int64, 0..K: how many drafts each request really has

    def __post_init__(self) -> None:
        if self.probs_BKV is None:
            raise InvalidInput(
                "drafts need probs_BKV, the law they were drawn from; argmax drafts are a point mass"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a verification was decided by; the audit keeps it."""

    draft_probs_BK: "Tensor"  # float64, of each drafted token under its own law,
    target_probs_BK: "Tensor"  # and under the law to commit by
    uniforms_BL: "Tensor"  # accept coins, and the uniform of the token that was drawn
    cumulative_BV: "Tensor"  # sums up to each id of what it was drawn from: a target row or a residual


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one step commits: the first `num_committed` tokens of each row."""

    token_ids_BL: "Tensor"  # int64; positions behind num_committed hold no meaning
    num_committed_B: "Tensor"  # int64, 1..K + 1
    is_draft_BL: "Tensor"  # bool: the token is an accepted draft; the others were drawn from the target
    behavior_logprobs_BL: "Tensor"  # float64, log of the law each token was drawn from
    evidence: "Evidence | None" = None  # of one verification; None where two were joined

    @property
    def num_accepted_B(self) -> "Tensor":
        """Accepted drafts, int64, 0..K."""
        return self.is_draft_BL.sum(dim=1)


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
