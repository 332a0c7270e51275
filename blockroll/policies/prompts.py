"""Prompts as users have them, text, token ids or messages, made into the tokens that a policy goes on from.

One function encodes for every path, so that a pool, a run, a conversion and the command line start a policy
from the same tokens.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How long a prompt may be, where `free` tokens must fit behind it."""

    ends: tuple[int, ...]  # ascending lengths that no text crosses; the last one is the context's
    free: int = 1

    @classmethod
    def of(cls, max_length: int, boundaries: Sequence[int], *, free: int = 1) -> "Room":
        """Of a context of so many tokens, with the boundaries below it (`Policy.length_boundaries`)."""
        return cls(ends=(*(each for each in boundaries if each < max_length), max_length), free=free)

    def kept(self, num_tokens: int) -> int:
        """The most tokens of a prompt of so many that leave room: all of them where it fits, 0 where none."""
        kept = before = 0
        for end in self.ends:
            fitting = min(num_tokens, end - self.free)
            kept, before = (fitting if fitting > before else kept), end
        return kept

    def fits(self, num_tokens: int) -> bool:
        """Whether a prompt of so many tokens leaves room."""
        return self.kept(num_tokens) == num_tokens

    @property
    def excess(self) -> str:
        """What prompts that don't fit have, in words."""
        spans = [(max(end - self.free + 1, 1), end) for end in self.ends[:-1]]
        between = [f"{low} to {high} tokens" if low < high else f"{high} tokens" for low, high in spans]
        return " or ".join([*between, f"more than {self.ends[-1] - self.free} tokens"])


class PromptEncoder:
    """Makes tokens of prompts, one after another; what does not depend on the prompt is found out once."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """The tokenizer stays as it is meanwhile. `vocab_size` bounds the tokens; None: who serves does."""
        self._tokenizer = tokenizer
        self._template_options = dict(chat_template_kwargs or {})
        self._vocab_size = vocab_size
        self._start: tuple[int, ...] | None = None

    def __call__(self, prompt: PromptInput, *, name: str = "the prompt") -> tuple[int, ...]:
        """The token ids of one prompt, as `encode_prompt` says."""
        if isinstance(prompt, str):
            token_ids = self._encode_text(prompt, name)
            kind = "empty text, to which this tokenizer adds no start token"
        elif isinstance(prompt, list | tuple) and not prompt:
            token_ids, kind = (), "empty"
        elif _is_list_of(prompt, Mapping):
            token_ids = _encode_messages(_needed(self._tokenizer, name), prompt, self._template_options, name)
            kind = "messages that the chat template makes no text of"
        elif _is_list_of(prompt, Integral):
            token_ids, kind = tuple(map(int, prompt)), "empty"
        else:
            raise InvalidInput(f"{name} is {_shown(prompt)}; a prompt is {_KINDS}{_advice(prompt)}")
        if not token_ids:
            raise InvalidInput(f"{name} is {kind}; at least one token is needed (a start token will do)")
        if self._vocab_size is not None and not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
            unknown = next(each for each in token_ids if not 0 <= each < self._vocab_size)
            raise InvalidInput(f"{name} holds token {unknown}, outside the vocabulary of {self._vocab_size}")
        return token_ids

    def _encode_text(self, text: str, name: str) -> tuple[int, ...]:
        tokenizer = _needed(self._tokenizer, name)
        bare = _ids(tokenizer, text, add_special_tokens=False, name=name)
        if self._start is None:
            self._start = _added_before(tokenizer)
        return bare if bare[: len(self._start)] == self._start else (*self._start, *bare)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: PromptInput,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    name: str = "the prompt",
) -> tuple[int, ...]:
    """The token ids of one prompt; at least one. For many of them make one `PromptEncoder`.

    Text gets the start token that the tokenizer adds, unless it begins with it (templated text does), and
    never the end token that some add: a policy goes on from a prompt, it does not begin behind its end.
    Special tokens written in text are those tokens. Messages go through the tokenizer's chat template, which
    opens the assistant's turn, or goes on with the last message if that is the assistant's; the template
    alone decides on start tokens. `chat_template_kwargs` are handed to it. Token ids are taken as they are.

    Raises InvalidInput, which calls the prompt by `name`, for anything else, for an empty prompt, and for
    messages where the tokenizer has no chat template or its template refuses them.
    """
    return PromptEncoder(tokenizer, chat_template_kwargs=chat_template_kwargs)(prompt, name=name)


def is_prompt(value: Any) -> bool:
    """Whether data files and tasks may hold it as a prompt: text, token ids or messages, none empty."""
    if isinstance(value, str):
        return bool(value)
    if not value or not _is_list_of(value, Mapping):
        return bool(value) and _is_list_of(value, Integral)
    return all(map(_is_message, value))


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
    prompts: Sequence[Sequence[int]], *, room: Room, overlong: OverlongRule, names: Sequence[str] = ()
) -> list[FittedPrompt]:
    """The prompts that leave room, by the rule for those that are longer; before a run starts.

    `error` raises InvalidInput with all of them counted and the longest named; `skip` leaves them out;
    `truncate` keeps their last tokens. The last two are counted in one warning. `names` stand for
    "prompt 0", "prompt 1", ... in messages.
    """
    if overlong not in ("error", "skip", "truncate"):
        raise InvalidInput(f"overlong_prompts must be 'error', 'skip' or 'truncate', got {overlong!r}")
    if room.kept(room.ends[-1]) < 1:
        raise InvalidInput(
            f"prompts may have {room.ends[-1] - room.free} tokens; at least 1 must fit: lower max_tokens"
        )
    kept = [room.kept(len(token_ids)) for token_ids in prompts]
    long = [index for index, token_ids in enumerate(prompts) if kept[index] < len(token_ids)]
    if long:
        longest = max(long, key=lambda index: len(prompts[index]))
        found = (
            f"{len(long)} of {len(prompts)} prompts have {room.excess}, the longest is "
            f"{names[longest] if names else f'prompt {longest}'} with {len(prompts[longest])}"
        )
        if overlong == "error":
            raise InvalidInput(f"{found}; shorten them, or set overlong_prompts to 'skip' or 'truncate'")
        does = "they are left out" if overlong == "skip" else "the last tokens of each are kept"
        logger.warning("%s: %s", found, does)
    return [
        FittedPrompt(index, tuple(token_ids[len(token_ids) - kept[index] :]))
        for index, token_ids in enumerate(prompts)
        if kept[index] == len(token_ids) or overlong == "truncate"
    ]


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
        if not _is_message(message):
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
        raise InvalidInput(f"{name} needs a tokenizer, and there is no tokenizer here: give token ids")
    return tokenizer


def _is_list_of(value: Any, kind: type) -> bool:
    """Whether it is a list or tuple, and its items are of this kind; bool is no number here."""
    return isinstance(value, list | tuple) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in value
    )


def _is_message(message: Mapping[str, Any]) -> bool:
    return isinstance(message.get("role"), str) and bool({"content", "tool_calls"} & message.keys())


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
