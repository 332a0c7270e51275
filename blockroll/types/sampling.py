"""How the tokens of one request are drawn and when it ends.

Shapes: N positions, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from annotated_types import Ge, Gt, Le
from typing_extensions import Doc

from blockroll.errors import InvalidInput
from blockroll.types.bounds import check_bounds
from blockroll.types.names import names_options
from blockroll.types.plan import Law

if TYPE_CHECKING:
    from torch import Tensor

LogitsProcessor = Callable[["Tensor", "Tensor"], "Tensor"]


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
class SamplingOptions:
    """The plain values of `Sampling`: config files, the command line and trainers offer the same.

    A field added here, with its bounds and its sentence, is an option of all of them.
    """

    temperature: Annotated[float, Ge(0), Doc("what logits are divided by; 0 means greedy")] = 1.0
    max_tokens: Annotated[int, Ge(1), Doc("completion length at most")] = 128
    # Truncation, of the law at the temperature; in this order, as transformers does.
    top_k: Annotated[int, Ge(0), Doc("best tokens that stay, of equals those of lowest id; 0 keeps all")] = 0
    top_p: Annotated[
        float, Gt(0), Le(1), Doc("mass that the fewest best tokens which stay must hold; 1 keeps all")
    ] = 1.0
    min_p: Annotated[
        float, Ge(0), Le(1), Doc("share of the best token's probability that a token needs; 0 keeps all")
    ] = 0.0
    # Edits of the logits, before the temperature; counts take in accepted drafts.
    repetition_penalty: Annotated[
        float, Gt(0), Doc("divides logits of tokens in the text, multiplies negative ones; 1 changes nothing")
    ] = 1.0
    presence_penalty: Annotated[
        float, Doc("taken from the logits of tokens that the completion holds; 0 changes nothing")
    ] = 0.0
    frequency_penalty: Annotated[
        float, Doc("taken from them for each time it holds them; 0 changes nothing")
    ] = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling(SamplingOptions):
    """How the tokens of one request are drawn and when it ends."""

    draft_temperature: float | None = None  # None: as temperature; 0: argmax drafts, a point mass
    stop: tuple[str, ...] = ()  # a string alone is one; the token that completes it is the last one kept
    stop_token_ids: tuple[int, ...] = ()  # beside the policy's own end tokens
    ignore_eos: bool = False  # go on past the policy's own end tokens (for speed runs)
    law: Law = field(default_factory=Law)
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # added, by token id
    min_tokens: int = 0  # so many tokens stand before one that ends it, or completes a stop string that does
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # sequences that are never completed
    # Called as transformers calls them: ids (1, T), scores (1, V) of one row; state of their own is refused.
    logits_processors: tuple[LogitsProcessor, ...] = ()
    constraint: "Constraint | None" = None  # what every prefix of the completion must satisfy
    allow_truncated_mix: bool = False  # a mixed law without full support cannot be corrected: ask by name

    def __post_init__(self) -> None:
        check_bounds(SamplingOptions, self)
        self._check_types()
        self._check_processing()
        if self.draft_temperature is not None and not (
            math.isfinite(self.draft_temperature) and self.draft_temperature >= 0
        ):
            raise InvalidInput(
                f"draft_temperature must be at least 0, got {self.draft_temperature}; "
                "0 means argmax drafts, None means the sampling temperature"
            )
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

    def _check_types(self) -> None:
        """What a wrong type would turn into another request, or into a fault of a step that serves others."""
        for name, allowed, kind in (
            ("stop", "a string or a list of strings", str),
            ("stop_token_ids", "a list of token ids", Integral),
            ("bad_words_ids", "a list of lists of token ids", list | tuple),
            ("logits_processors", "a list of functions", Callable),
        ):
            value = getattr(self, name)
            listed = (value,) if name == "stop" and isinstance(value, str) else value
            if not _is_list_of(listed, kind):
                raise InvalidInput(f"{name} must be {allowed}, got {value!r}")
            object.__setattr__(self, name, tuple(listed))
        object.__setattr__(self, "bad_words_ids", tuple(map(tuple, self.bad_words_ids)))
        bias = self.logit_bias
        for name, is_allowed, allowed in (
            ("ignore_eos", isinstance(self.ignore_eos, bool), "True or False"),
            ("allow_truncated_mix", isinstance(self.allow_truncated_mix, bool), "True or False"),
            ("min_tokens", _is_list_of([self.min_tokens], Integral), "a whole number"),
            (
                "bad_words_ids",
                all(_is_list_of(word, Integral) for word in self.bad_words_ids),
                "a list of lists of token ids",
            ),
            (
                "logit_bias",
                isinstance(bias, Mapping)
                and _is_list_of([*bias], Integral)
                and _is_list_of([*bias.values()], Real),
                "a dict of a number for each token id",
            ),
            (
                "draft_temperature",
                self.draft_temperature is None or _is_list_of([self.draft_temperature], Real),
                "a number or None",
            ),
            ("law", isinstance(self.law, Law), "a Law, as Law(1.0), the target, or Law(0.5), a mixed one"),
            (
                "constraint",
                self.constraint is None or callable(getattr(self.constraint, "start", None)),
                "a Regex, a JsonSchema or another Constraint",
            ),
        ):
            if not is_allowed:
                raise InvalidInput(f"{name} must be {allowed}, got {getattr(self, name)!r}")

    def _check_processing(self) -> None:
        for name, is_allowed, allowed in (
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
    def truncation(self) -> tuple[str, ...]:
        """The options in force that leave out the less likely tokens, whose cut moves with rounding."""
        cuts = {"top_k": self.top_k > 0, "top_p": self.top_p < 1, "min_p": self.min_p > 0}
        return tuple(name for name, is_set in cuts.items() if is_set)

    @property
    def is_truncated(self) -> bool:
        """Whether tokens that the policy could draw are never drawn: pi/mu then averages to less than 1."""
        return bool(
            self.truncation
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
    def is_plan_free(self) -> bool:
        """Whether its text is that of plain decoding under any plan: its drafts are point masses."""
        return 0 in (self.temperature, self.draft_temperature) and self.law.weight == 1

    @property
    def logprob_temperature(self) -> float:
        """The temperature policy log-probabilities are reported at: 1 when greedy."""
        return self.temperature or 1.0


def _is_list_of(value: Any, kind: Any) -> bool:
    """Whether it is a list or tuple, and its items are of this kind; bool is no number here."""
    return isinstance(value, list | tuple) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in value
    )


Sampling.__init__ = names_options("Sampling")(Sampling.__init__)  # type: ignore[method-assign]
