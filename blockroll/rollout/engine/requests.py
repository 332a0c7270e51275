"""Requests before they run: where their seeds come from, and what the door refuses."""

import hashlib
import pickle
from collections import deque
from dataclasses import dataclass

import torch

from blockroll.errors import InvalidInput
from blockroll.types import LogitsProcessor, Request

_SEED_LIMIT = 1 << 63
_probed: deque[tuple[LogitsProcessor, int]] = deque(maxlen=64)  # processors that passed, by vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an engine can serve."""

    vocab_size: int
    max_length: int  # tokens of prompt and completion
    boundaries: tuple[int, ...] = ()  # as `Policy.length_boundaries`

    def room(self, num_prompt_tokens: int) -> int:
        """Completion tokens that a prompt leaves room for: up to the end of the context or a boundary."""
        ends = [end for end in (*self.boundaries, self.max_length) if end >= num_prompt_tokens]
        return min(ends) - num_prompt_tokens if ends else 0


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
    if not -_SEED_LIMIT <= request.seed < _SEED_LIMIT:
        raise InvalidInput(f"{name} has seed {request.seed}, outside 64 bits")


def check_processor(processor: LogitsProcessor, vocab_size: int) -> None:
    """Raise InvalidInput for a logits processor that is not a function of the ids and scores it is given.

    Verifying a block asks for several positions at once, some of them for drafts that are then rejected: what
    a processor remembers of its calls would be wrong. It is called three times on made-up rows.
    """
    if any(known is processor and size == vocab_size for known, size in _probed):
        return
    name = f"logits processor {type(processor).__name__}"
    advice = (
        "write it as a function of input_ids (1, T) and scores (1, V) alone, or as a constraint, whose guide "
        "is told which tokens were committed"
    )
    short, long = torch.tensor([[0]]), torch.tensor([[0, vocab_size - 1, 0]])
    scores_1V = torch.linspace(-1, 1, vocab_size, dtype=torch.float64)[None]
    state = _state(processor)
    try:
        results = [processor(ids_1T, scores_1V.clone()) for ids_1T in (short, long, short)]
    except Exception as error:
        raise InvalidInput(f"{name} cannot be evaluated for one row at a time: {error}; {advice}") from error
    if any(not torch.is_tensor(result) or result.shape != scores_1V.shape for result in results):
        raise InvalidInput(f"{name} does not return scores of the shape it was given, (1, {vocab_size})")
    if not torch.equal(results[0], results[2]) or _state(processor) != state:
        raise InvalidInput(f"{name} has state of its own that a call changes; {advice}")
    _probed.append((processor, vocab_size))


def _state(processor: LogitsProcessor) -> bytes | None:
    try:
        return pickle.dumps(processor)
    except (pickle.PicklingError, AttributeError, TypeError):  # a closure: only its results can be compared
        return None
