"""Requests before they run: where their seeds come from, and what the door refuses."""

import hashlib
from dataclasses import dataclass

from blockroll.errors import InvalidInput
from blockroll.types import Request

_SEED_LIMIT = 1 << 63


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an engine can serve."""

    vocab_size: int
    max_length: int  # tokens of prompt and completion
    mask_token_id: int | None


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
    if length >= limits.max_length:
        raise InvalidInput(
            f"{name} has {length} tokens, but the context holds {limits.max_length} and at least one must be "
            "free for the completion; shorten the prompt or raise max_length if the policy was built for more"
        )
    if committed and len(committed) >= request.sampling.max_tokens:
        raise InvalidInput(
            f"{name} resumes after {len(committed)} tokens, but max_tokens is {request.sampling.max_tokens}"
        )
    for position, token_id in enumerate((*request.prompt_ids, *committed)):
        if not 0 <= token_id < limits.vocab_size:
            raise InvalidInput(
                f"{name} holds token {token_id} at position {position}, outside the vocabulary of "
                f"{limits.vocab_size}; allowed are 0 to {limits.vocab_size - 1}"
            )
        # A policy may have drawn its own mask token: what is committed stays, whatever it is.
        if token_id == limits.mask_token_id and position < len(request.prompt_ids):
            raise InvalidInput(
                f"{name} holds the mask token {token_id} at position {position}; masks are blockroll's own, "
                "remove it from the prompt"
            )
    if not -_SEED_LIMIT <= request.seed < _SEED_LIMIT:
        raise InvalidInput(f"{name} has seed {request.seed}, outside 64 bits")
