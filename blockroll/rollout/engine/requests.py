"""Requests before they run: where their seeds come from, and what the door refuses."""

import hashlib
from dataclasses import dataclass

from blockroll.errors import InvalidInput
from blockroll.policies.prompts import Room
from blockroll.rollout.engine.processors import check_processor
from blockroll.types import Request

_SEED_LIMIT = 1 << 63


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an engine can serve."""

    vocab_size: int
    max_length: int  # tokens of prompt and completion
    boundaries: tuple[int, ...] = ()  # as `Policy.length_boundaries`
    max_text: int | None = None  # tokens of a text that the cache has room for; None: max_length
    is_plan_free: bool = False  # whether texts must be the same under every plan that may be chosen

    @property
    def longest_text(self) -> int:
        """Tokens of prompt and completion that the context and the cache have room for."""
        return self.max_length if self.max_text is None else min(self.max_length, self.max_text)

    def room(self, num_prompt_tokens: int) -> int:
        """Completion tokens that a prompt leaves room for: up to the end of the context or a boundary."""
        ends = [end for end in self.prompt_room().ends if end >= num_prompt_tokens]
        return min(ends) - num_prompt_tokens if ends else 0

    def prompt_room(self, *, free: int = 1) -> Room:
        """How long prompts may be that leave so many completion tokens."""
        return Room.of(self.max_length, self.boundaries, free=free)


def derive_seed(*words: object) -> int:
    """63 bits from what the seed is for: equal words give equal seeds."""
    digest = hashlib.blake2b("/".join(map(str, words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def check_request(request: Request, limits: Limits) -> None:
    """Raise InvalidInput, naming the request, if it cannot be served."""
    name = f"request {request.request_id!r}"
    if not request.prompt_ids:
        raise InvalidInput(
            f"{name} has an empty prompt; at least one token is needed (a start token will do)"
        )
    committed = request.prefix.token_ids if request.prefix else ()
    length = len(request.prompt_ids) + len(committed)
    if len(request.prompt_ids) in limits.boundaries and length < limits.max_length:
        raise InvalidInput(
            f"{name} has a prompt of {length} tokens, exactly as many as a text of this policy may have "
            "before the factors of its positions change (longrope); give a prompt one token shorter or longer"
        )
    if len(committed) >= limits.room(len(request.prompt_ids)):
        raise InvalidInput(
            f"{name} has {length} tokens, but the context holds {limits.max_length} and at least one must be "
            "free for the completion; shorten the prompt or raise max_length if the policy was built for more"
        )
    longest = min(len(request.prompt_ids) + request.sampling.max_tokens, limits.max_length)
    if longest > limits.longest_text:
        raise InvalidInput(
            f"{name} may become a text of {longest} tokens, and the cache has room for "
            f"{limits.longest_text} in one text; give it more memory (memory_fraction), or shorten "
            "the prompt or max_tokens"
        )
    if committed and len(committed) >= request.sampling.max_tokens:
        raise InvalidInput(
            f"{name} resumes after {len(committed)} tokens, but max_tokens is {request.sampling.max_tokens}"
        )
    text = (*request.prompt_ids, *committed)
    if min(text) < 0 or max(text) >= limits.vocab_size:
        position = next(i for i, token_id in enumerate(text) if not 0 <= token_id < limits.vocab_size)
        raise InvalidInput(
            f"{name} holds token {text[position]} at position {position}, outside the vocabulary of "
            f"{limits.vocab_size}; allowed are 0 to {limits.vocab_size - 1}"
        )
    sampling = request.sampling
    for option, token_ids in (
        ("logit_bias", sampling.logit_bias),
        ("bad_words_ids", [token_id for word in sampling.bad_words_ids for token_id in word]),
        ("stop_token_ids", sampling.stop_token_ids),
    ):
        unknown = [token_id for token_id in token_ids if not 0 <= token_id < limits.vocab_size]
        if unknown:
            raise InvalidInput(
                f"{name} has token {unknown[0]} in {option}, outside the vocabulary of {limits.vocab_size}; "
                f"allowed are 0 to {limits.vocab_size - 1}"
            )
    for processor in sampling.logits_processors:
        check_processor(processor, limits.vocab_size)
    if limits.is_plan_free and not sampling.is_plan_free:
        raise InvalidInput(
            f"{name} has drafts that are drawn from mask rows, and a reproducible 'auto' may choose these: "
            "its text would depend on it; give it draft_temperature=0 and an unmixed law, or fix the plan"
        )
    if isinstance(request.priority, bool) or not isinstance(request.priority, int):
        raise InvalidInput(
            f"{name} has priority {request.priority!r}; give a whole number, the higher the earlier it joins"
        )
    if not -_SEED_LIMIT <= request.seed < _SEED_LIMIT:
        raise InvalidInput(f"{name} has seed {request.seed}, outside 64 bits")
