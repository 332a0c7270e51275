"""Constraints on text: regular expressions and JSON schemas, walked along drafts by llguidance.

A constraint says which tokens may follow each prefix of a completion. Its guide walks along a block's drafts,
gives a mask for each position, and goes back: nothing is parsed twice. Where the text is complete an end
token may follow, and where it is not none may. Special tokens are no text: they are allowed only as ends.

Masked tokens have no probability, so each token is drawn from the policy's law given that the text can still
be completed behind it. That is not the policy's law given that the whole text is valid: no method that masks
one token after the other draws from that.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockroll.errors import InvalidInput, MissingDependency
from blockroll.types import Guide


@dataclass(frozen=True, slots=True)
class Regex:
    """The whole completion matches this regular expression (Rust syntax, no look-around)."""

    pattern: str

    def start(self, vocab_size: int, tokenizer: Any, end_token_ids: frozenset[int]) -> Guide:
        """A guide before the first token. InvalidInput for an expression that is none or matches nothing."""
        grammar = _llguidance().LLMatcher.grammar_from_regex(self.pattern)
        return _start(f"regular expression {self.pattern!r}", grammar, vocab_size, tokenizer, end_token_ids)


@dataclass(frozen=True, slots=True, init=False)
class JsonSchema:
    """The whole completion is JSON that this schema accepts. Bound strings and lists, or it may never end."""

    text: str

    def __init__(self, schema: Mapping[str, Any] | str) -> None:
        """A schema as JSON or as what JSON would load."""
        try:
            loaded = json.loads(schema) if isinstance(schema, str) else schema
        except json.JSONDecodeError as error:
            raise InvalidInput(f"a JSON schema must be JSON, got {schema!r}: {error}") from error
        object.__setattr__(self, "text", json.dumps(loaded))

    def start(self, vocab_size: int, tokenizer: Any, end_token_ids: frozenset[int]) -> Guide:
        """A guide before the first token. InvalidInput for a schema that is none or accepts nothing."""
        grammar = _llguidance().LLMatcher.grammar_from_json_schema(
            self.text, overrides={"whitespace_flexible": False}
        )
        return _start(f"JSON schema {self.text}", grammar, vocab_size, tokenizer, end_token_ids)


class GrammarGuide:
    """Where one completion stands in a grammar."""

    def __init__(
        self,
        matcher: Any,
        vocab_size: int,
        end_token_ids: frozenset[int],
        special_ids: frozenset[int] = frozenset(),
    ) -> None:
        """A matcher of its own, which moves with the completion; special tokens stand for no text."""
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._end_token_ids = end_token_ids
        self._special_ids = special_ids
        self._has_ended = False
        self._masks: dict[tuple[int, ...], Tensor] = {}  # by drafts behind where it stands

    def allowed(self, drafts: Sequence[int], first: int) -> Tensor:
        """As `Guide.allowed`: bool (N, V), a row behind each of the drafts from the first asked for on."""
        rows: list[Tensor] = []
        num_consumed, has_ended = 0, self._has_ended
        for num_drafts in range(len(drafts) + 1):
            is_asked = num_drafts >= first
            if is_asked:
                rows.append(self._mask(tuple(drafts[:num_drafts]), has_ended))
            if num_drafts == len(drafts):
                break
            draft = drafts[num_drafts]
            if is_asked and not rows[-1][draft]:
                break
            has_ended = has_ended or draft in self._end_token_ids
            if not has_ended:
                self._consume(draft)
                num_consumed += 1
        if num_consumed:
            self._matcher.rollback(num_consumed)
        return torch.stack(rows)

    def advance(self, token_ids: Sequence[int]) -> None:
        """These tokens were committed. InvalidInput if the constraint does not allow them."""
        for token_id in token_ids:
            if not self._mask((), self._has_ended)[token_id]:
                raise InvalidInput(
                    f"token {token_id} is not allowed by the constraint after the tokens before it; a prefix "
                    "to resume from must satisfy the constraint of its request"
                )
            self._masks.clear()
            self._has_ended = self._has_ended or token_id in self._end_token_ids
            if not self._has_ended:
                self._consume(token_id)

    def _mask(self, drafts: tuple[int, ...], has_ended: bool) -> Tensor:
        """Asked twice a step of the first position, which is drafted and verified."""
        mask_V = self._masks.get(drafts)
        if mask_V is None:
            mask_V = self._ends() if has_ended else self._matcher_mask()
            self._masks[drafts] = mask_V
        return mask_V

    def _matcher_mask(self) -> Tensor:
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(words, bitorder="little")[: self._vocab_size].astype(bool)
        mask_V = torch.zeros(self._vocab_size, dtype=torch.bool)  # rows padded past the tokenizer stay out
        mask_V[: len(bits)] = torch.from_numpy(bits)
        # Of all end tokens the matcher knows the tokenizer's, and of special ones those marked in its file.
        mask_V[list(self._special_ids)] = False
        mask_V[list(self._end_token_ids)] = bool(self._matcher.is_accepting())
        return mask_V

    def _ends(self) -> Tensor:
        mask_V = torch.zeros(self._vocab_size, dtype=torch.bool)
        mask_V[list(self._end_token_ids)] = True
        return mask_V

    def _consume(self, token_id: int) -> None:
        if not self._matcher.consume_token(token_id):
            raise RuntimeError(f"llguidance refused token {token_id}: {self._matcher.get_error()}")


def _start(
    name: str, grammar: str, vocab_size: int, tokenizer: Any, end_token_ids: frozenset[int]
) -> GrammarGuide:
    if tokenizer is None:
        raise InvalidInput(f"{name} constrains text, but the policy has no tokenizer")
    if not end_token_ids:
        raise InvalidInput(f"{name} needs an end token to end with, but the policy has none")
    matcher = _compiled(name, grammar, tokenizer).deep_copy()
    special_ids = frozenset(each for each in tokenizer.all_special_ids if each < vocab_size)
    guide = GrammarGuide(matcher, vocab_size, end_token_ids, special_ids)
    if not guide.allowed((), 0).any():
        raise InvalidInput(f"{name} cannot be satisfied: no token may come first")
    return guide


@lru_cache(maxsize=64)
def _compiled(name: str, grammar: str, tokenizer: Any) -> Any:
    """A matcher at its start, to be copied for each request."""
    llguidance = _llguidance()
    vocabulary = _vocabulary(tokenizer)
    message = llguidance.LLMatcher.validate_grammar(grammar, vocabulary)
    if message:
        raise InvalidInput(f"{name} cannot be used: {message}")
    matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0)
    if matcher.is_error():
        raise InvalidInput(f"{name} cannot be used: {matcher.get_error()}")
    return matcher


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Any) -> Any:
    import llguidance.hf

    try:
        return llguidance.hf.from_tokenizer(tokenizer)
    except ValueError as error:
        raise InvalidInput(
            "constraints on text need a tokenizer that llguidance reads, got "
            f"{type(tokenizer).__name__}: {error}"
        ) from error


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MissingDependency(
            "constraints on text need llguidance: pip install 'blockroll[constraints]'"
        ) from error
    return llguidance
