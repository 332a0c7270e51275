"""Prompts as users have them, text, token ids or messages, made into the tokens that a policy goes on from.

One function encodes for every path, so that a pool, a run, a conversion and the command line start a policy
from the same tokens.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from blockroll.errors import InvalidInput

logger = logging.getLogger(__name__)

Messages = Sequence[
    Mapping[str, Any]
]  # of one conversation: `role` and `content`, as chat templates take them
PromptInput = str | Sequence[int] | Messages
OverlongRule = Literal["error", "skip", "truncate"]

_KINDS = "text, a list of token ids, or a list of messages like {'role': 'user', 'content': 'text'}"
_PROBE = "a"  # what a tokenizer puts around it, it puts around every text


class FittedPrompt(NamedTuple):
    """A prompt that is short enough."""

    number: int  # its place among those given, from 0
    token_ids: tuple[int, ...]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: PromptInput,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    name: str = "the prompt",
) -> tuple[int, ...]:
    """The token ids of one prompt; at least one.

    Text gets the start token that the tokenizer adds, unless it begins with it (templated text does), and
    never the end token that some add: a policy goes on from a prompt, it does not begin behind its end.
    Special tokens written in text are those tokens. Messages go through the tokenizer's chat template, which
    opens the assistant's turn, or goes on with the last message if that is the assistant's; the template
    alone decides on start tokens. `chat_template_kwargs` are handed to it. Token ids are taken as they are.

    Raises InvalidInput, which calls the prompt by `name`, for anything else, for an empty prompt, and for
    messages where the tokenizer has no chat template or its template refuses them.
    """
    if isinstance(prompt, str):
        token_ids = _encode_text(_needed(tokenizer, name), prompt, name)
        kind = "empty text, to which this tokenizer adds no start token"
    elif isinstance(prompt, list | tuple) and not prompt:
        token_ids, kind = (), "empty"
    elif _is_list_of(prompt, Mapping):
        token_ids = _encode_messages(_needed(tokenizer, name), prompt, chat_template_kwargs or {}, name)
        kind = "messages that the chat template makes no text of"
    elif _is_list_of(prompt, Integral):
        token_ids, kind = tuple(map(int, prompt)), "empty"
    else:
        raise InvalidInput(f"{name} is {_shown(prompt)}; a prompt is {_KINDS}{_advice(prompt)}")
    if not token_ids:
        raise InvalidInput(f"{name} is {kind}; at least one token is needed (a start token will do)")
    return token_ids


def as_prompts(prompts: PromptInput | Iterable[PromptInput]) -> list[Any]:
    """A list of prompts of what may be a single one: text, token ids or messages are one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes | bytearray | Mapping) or not isinstance(prompts, Iterable):
        raise InvalidInput(
            f"prompts are {_shown(prompts)}; give one prompt or a list of them, where a prompt is {_KINDS}"
            f"{_advice(prompts)}"
        )
    listed: list[Any] = list(prompts)
    is_one = bool(listed) and (_is_list_of(listed, Mapping) or _is_list_of(listed, Integral))
    return [listed] if is_one else listed


def check_messages(messages: Any) -> None:
    """Raise InvalidInput for anything but the messages of one conversation."""
    if not messages or not _is_list_of(messages, Mapping):
        raise InvalidInput(
            f"a conversation is a list of messages like {{'role': 'user', 'content': 'text'}}, got "
            f"{_shown(messages)}; text, token ids and several conversations are prompts for `requests`"
        )


def fit_prompts(
    prompts: Sequence[Sequence[int]], *, max_tokens: int, overlong: OverlongRule, names: Sequence[str] = ()
) -> list[FittedPrompt]:
    """The prompts of at most `max_tokens` tokens, by the rule for those that are longer; before a run starts.

    `error` raises InvalidInput with all of them counted and the longest named; `skip` leaves them out;
    `truncate` keeps their last tokens. The last two are counted in one warning. `names` stand for
    "prompt 0", "prompt 1", ... in messages.
    """
    if overlong not in ("error", "skip", "truncate"):
        raise InvalidInput(f"overlong_prompts must be 'error', 'skip' or 'truncate', got {overlong!r}")
    if max_tokens < 1:
        raise InvalidInput(f"prompts may have {max_tokens} tokens; at least 1 must fit: lower max_tokens")
    long = [index for index, token_ids in enumerate(prompts) if len(token_ids) > max_tokens]
    if not long:
        return [FittedPrompt(index, tuple(token_ids)) for index, token_ids in enumerate(prompts)]
    longest = max(long, key=lambda index: len(prompts[index]))
    found = (
        f"{len(long)} of {len(prompts)} prompts have more than {max_tokens} tokens, the longest is "
        f"{names[longest] if names else f'prompt {longest}'} with {len(prompts[longest])}"
    )
    if overlong == "error":
        raise InvalidInput(f"{found}; shorten them, or set overlong_prompts to 'skip' or 'truncate'")
    if overlong == "skip":
        logger.warning("%s: they are left out", found)
        return [
            FittedPrompt(index, tuple(token_ids))
            for index, token_ids in enumerate(prompts)
            if len(token_ids) <= max_tokens
        ]
    logger.warning("%s: the last %d tokens of each are kept", found, max_tokens)
    return [FittedPrompt(index, tuple(token_ids[-max_tokens:])) for index, token_ids in enumerate(prompts)]


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str, name: str) -> tuple[int, ...]:
    bare = _ids(tokenizer, text, add_special_tokens=False, name=name)
    start = _added_before(tokenizer)
    return bare if bare[: len(start)] == start else (*start, *bare)


def _added_before(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before every text."""
    bare = _ids(tokenizer, _PROBE, add_special_tokens=False)
    whole = _ids(tokenizer, _PROBE, add_special_tokens=True)
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    raise InvalidInput(
        f"{type(tokenizer).__name__} encodes a text otherwise when it adds special tokens ({list(bare)} and "
        f"{list(whole)}), so its start tokens can't be told; give prompts as token ids"
    )


def _ids(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool, name: str = "the prompt"
) -> tuple[int, ...]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"{name} holds {text[error.start]!a} at character {error.start}: half of a surrogate pair, which "
            "is no text (bytes that are no UTF-8, or a JSON escape cut in two); clean it before"
        ) from None
    # Its own limit on length only warns; the engine's door refuses what the policy can't hold.
    return tuple(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def _encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], options: Mapping[str, Any], name: str
) -> tuple[int, ...]:
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or not ({"content", "tool_calls"} & message.keys()):
            raise InvalidInput(
                f"message {number} of {name} is {_shown(message)}; a message is a dict with a role and a "
                "content, like {'role': 'user', 'content': 'text'}"
            )
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInput(
            f"{name} is messages, but the tokenizer has no chat template: give the prompt as text, use the "
            "tokenizer of an instruction-tuned model, or set tokenizer.chat_template"
        )
    is_continued = messages[-1]["role"] == "assistant"
    turn = {"continue_final_message": True} if is_continued else {"add_generation_prompt": True}
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, **{**turn, **options}
        )
    except Exception as error:  # a template is a program of the checkpoint's authors
        raise InvalidInput(f"the chat template refuses {name}: {error}") from error
    return _ids(tokenizer, str(text), add_special_tokens=False, name=name)


def _needed(tokenizer: PreTrainedTokenizerBase | None, name: str) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise InvalidInput(f"{name} needs a tokenizer, and there is none: give token ids")
    return tokenizer


def _is_list_of(value: Any, kind: type) -> bool:
    """Whether it is a list or tuple, and its items are of this kind; bool is no number here."""
    return isinstance(value, list | tuple) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in value
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _advice(value: Any) -> str:
    if isinstance(value, bytes | bytearray):
        return "; decode bytes to text first"
    if isinstance(value, Mapping):
        is_message = "role" in value
        return "; put a single message into a list" if is_message else "; of an encoding give `input_ids`"
    if hasattr(value, "tolist"):
        return "; give `.tolist()` of a tensor or an array"
    return ""
