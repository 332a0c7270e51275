"""Which tokens end a text, whoever says so."""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def end_token_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None") -> tuple[int, ...]:
    """Every end token of the generation config, the model config and the tokenizer, each once.

    A chat model's turn often ends with a token that only one of the three knows. Ids outside the vocabulary
    of the logits can't be drawn and are left out, with a warning.
    """
    sources = (getattr(model, "generation_config", None), model.config, tokenizer)
    named = dict.fromkeys(token_id for source in sources for token_id in _ends_of(source))
    size = int(model.config.vocab_size)
    outside = [token_id for token_id in named if not 0 <= token_id < size]
    if outside:
        logger.warning(
            "end tokens %s are outside the vocabulary of %d and never end a text; correct eos_token_id of "
            "config.json, generation_config.json or the tokenizer",
            ", ".join(map(str, outside)),
            size,
        )
    return tuple(token_id for token_id in named if 0 <= token_id < size)


def special_token_ids(tokenizer: "PreTrainedTokenizerBase | None") -> frozenset[int]:
    """Tokens that stand for no text: decoding leaves them out unless asked."""
    if tokenizer is None:
        return frozenset()
    added = tokenizer.added_tokens_decoder.items()
    return frozenset((*tokenizer.all_special_ids, *(token_id for token_id, token in added if token.special)))


def _ends_of(source: Any) -> Iterator[int]:
    ends = getattr(source, "eos_token_id", None)
    if ends is not None:
        yield from map(int, ends if isinstance(ends, list | tuple) else [ends])
