"""What makes a dataclass of options: pydantic checks its fields, and each refusal is one sentence.

Types are strict (`1` is no bool, `true` no number), but for what YAML does to values: a list is a tuple,
a whole number or a text such as `1e-4` is a float, a mapping is a section.
"""

import dataclasses
import difflib
import functools
import reprlib
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, dataclass_transform

import pydantic
from pydantic import ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from blockroll.errors import ConfigError, InvalidInput
from blockroll.types.bounds import hints_of, refusal

T = TypeVar("T")

# Options as other libraries name them, and the options of ours that mean the same or what to do instead.
FOREIGN_NAMES = {
    "max_new_tokens": "max_tokens",
    "max_completion_length": "max_tokens",
    "max_length": "max_tokens",
    "n": "num_samples",
    "num_return_sequences": "num_samples",
    "num_generations": "group_size",
    "lr": "learning_rate",
    "batch_size": "max_batch_size",
    "max_steps": "steps",
    "epsilon": "clip_epsilon",
    "model": "path",
    "model_name_or_path": "path",
    "torch_dtype": "dtype",
    "output_dir": "runs_dir",
    "eval_steps": "eval_every",
    "save_steps": "checkpoint_every",
    "save_total_limit": "keep_checkpoints",
    "lora_rank": "rank",
    "r": "rank",
}

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120
_short.maxlist = _short.maxdict = _short.maxtuple = 8


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def options(cls: type[T]) -> type[T]:
    """A frozen, slotted, keyword-only dataclass whose fields are checked whenever one is made.

    A wrong option raises ConfigError: its name, what was given, what is allowed; all of them at once.
    """
    cls.__get_pydantic_core_schema__ = classmethod(_schema)  # type: ignore[attr-defined]
    config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    made: Any = pydantic.dataclasses.dataclass(frozen=True, slots=True, kw_only=True, config=config)(cls)
    check: Callable[..., None] = made.__init__

    @functools.wraps(check)
    def checked_init(self: Any, **values: Any) -> None:
        try:
            check(self, **values)
        except ValidationError as error:
            raise ConfigError(sentences(made, error)) from None

    made.__init__ = checked_init
    return typing.cast(type[T], made)


def from_mapping(cls: type[T], values: Mapping[str, Any]) -> T:
    """Options from nested mappings; ConfigError for unknown keys, wrong types and values out of bounds."""
    try:
        return pydantic.TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError(sentences(cls, error)) from None


def to_mapping(config: Any) -> dict[str, Any]:
    """The config as plain values, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def sentences(cls: type, error: ValidationError) -> str:
    """One sentence for each refused option, with the path of its section."""
    return "; ".join(_sentence(cls, each) for each in error.errors(include_url=False))


def shown(value: object) -> str:
    """A value as it stands in a message: on one line, and not all of it if it is long."""
    return _short.repr(value)


def _schema(cls: type, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
    """Sections may be mappings, and text that reads as a number is one where a float is asked."""
    schema: Any = handler(source)
    schema["strict"] = False  # of the dataclass itself, not of its fields
    floats = frozenset(name for name, hint in hints_of(cls).items() if _plain(hint) is float)
    return core_schema.no_info_before_validator_function(functools.partial(_read_numbers, floats), schema)


def _read_numbers(floats: frozenset[str], values: Any) -> Any:
    if not isinstance(values, Mapping):
        return values
    return {key: _number(value) if key in floats else value for key, value in values.items()}


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _sentence(cls: type, error: Any) -> str:
    kind, path, value = error["type"], error["loc"], error["input"]
    where = _dotted(path)
    owner, hint = _place(cls, path)
    if kind in ("unexpected_keyword_argument", "invalid_key"):
        return unknown_option(cls, owner, where, str(path[-1]))
    if kind == "value_error" and isinstance(error["ctx"]["error"], InvalidInput):
        return f"{where}.{error['ctx']['error']}" if where else str(error["ctx"]["error"])
    if kind in ("missing_keyword_only_argument", "missing_argument", "missing"):
        return f"option {where!r} is missing: it has no default"
    if kind in ("greater_than", "greater_than_equal", "less_than_equal", "finite_number"):
        return refusal(where, hint, value)
    plain = _plain(hint)
    if kind == "literal_error":
        allowed = "one of " + ", ".join(map(repr, _choices(hint)))
    elif kind == "float_type" and isinstance(value, str):
        allowed = "a number"
    elif kind == "tuple_type":
        allowed = "a list"
    elif kind == "too_short":
        allowed = "one or more values"
    elif kind == "dict_type":
        allowed = "a mapping"
    elif kind == "dataclass_type":
        return f"{where} is a section with options, got {shown(value)}"
    else:
        allowed = getattr(plain, "__name__", str(plain))
    return f"{where} must be {allowed}, got {shown(value)}"


def unknown_option(cls: type, owner: type, where: str, key: str) -> str:
    """Why there is no such option, and which one may be meant: by its letters, its section or its use."""
    names = list(hints_of(owner))
    elsewhere = {path.rpartition(".")[2]: path for path in all_options(cls)}
    near = difflib.get_close_matches(key, names, n=1)
    meant = FOREIGN_NAMES.get(key, "")
    if meant in names:
        advice = f"here it is called {meant!r}"
    elif near:
        advice = f"did you mean {near[0]!r}?"
    elif key in elsewhere or meant in elsewhere:
        advice = f"here it is {elsewhere.get(key, elsewhere.get(meant))!r}"
    else:
        advice = f"allowed are {', '.join(sorted(names))}"
    return f"unknown option {where!r}; {advice}"


def all_options(cls: type) -> list[str]:
    """The dotted paths of all options of a config and its sections."""
    paths = []
    for name, hint in hints_of(cls).items():
        if dataclasses.is_dataclass(hint):
            paths += [f"{name}.{below}" for below in all_options(typing.cast(type, hint))]
        else:
            paths.append(name)
    return paths


def by_path(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a mapping of a config holds, by the dotted paths of its options; those it lacks are left out."""
    found = {}
    for path in all_options(cls):
        section: Any = values
        *sections, name = path.split(".")
        for each in sections:
            section = section.get(each, {})
        if name in section:
            found[path] = section[name]
    return found


def _place(cls: type, path: Sequence[int | str]) -> tuple[type, Any]:
    """The section that a path leads into, and the annotation of what stands there."""
    owner: type = cls
    hint: Any = cls
    for step in path:
        if dataclasses.is_dataclass(hint):
            owner = typing.cast(type, hint)
            hint = hints_of(owner).get(str(step))
        elif isinstance(step, int):
            hint = typing.get_args(_plain(hint))[0]
    return owner, hint


def _plain(hint: Any) -> Any:
    """The type of an annotation without bounds and without None."""
    if typing.get_origin(hint) is typing.Annotated:
        return _plain(typing.get_args(hint)[0])
    arguments = [each for each in typing.get_args(hint) if each is not type(None)]
    if type(None) in typing.get_args(hint) and len(arguments) == 1:
        return _plain(arguments[0])
    return hint


def _choices(hint: Any) -> tuple[Any, ...]:
    plain = _plain(hint)
    return typing.get_args(plain) if typing.get_origin(plain) is Literal else ()


def _dotted(path: Sequence[int | str]) -> str:
    """`draft.block_sizes[0]`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) and text else f".{step}" if text else str(step)
    return text
