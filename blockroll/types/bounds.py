"""Bounds that stand in a field's type: `Annotated[float, Gt(0), Le(1), Doc("...; 1 keeps all")]`.

The sentence of a refusal follows from them, so that a bound is written once. What stands behind the
semicolon of a field's sentence says what to give instead.
"""

import dataclasses
import math
import typing
from numbers import Integral, Real
from typing import Any

from annotated_types import Ge, Gt, Le
from typing_extensions import Doc

from blockroll.errors import InvalidInput


def metadata_of(hint: Any) -> tuple[Any, ...]:
    """What an annotation says beside its type: bounds and a sentence."""
    return typing.get_args(hint)[1:] if typing.get_origin(hint) is typing.Annotated else ()


def sentence_of(hint: Any) -> str:
    """The sentence of a field, empty if it has none."""
    return next((each.documentation for each in metadata_of(hint) if isinstance(each, Doc)), "")


def allowed(hint: Any) -> str:
    """The bounds of an annotation in words, as in `must be ...`."""
    bounds: dict[type, Any] = {type(each): each for each in metadata_of(hint)}
    low, above, high = bounds.get(Ge), bounds.get(Gt), bounds.get(Le)
    if low is not None and high is not None:
        return f"between {low.ge} and {high.le}"
    parts = [f"at least {low.ge}"] if low is not None else []
    parts += [f"above {above.gt}"] if above is not None else []
    parts += [f"at most {high.le}"] if high is not None else []
    return " and ".join(parts)


def is_number(hint: Any, value: object) -> bool:
    """Whether a value is a number of its annotation's type, which is int or float; bool is none here."""
    kind = Integral if _type_of(hint) is int else Real
    return isinstance(value, kind) and not isinstance(value, bool)


def is_within(hint: Any, value: float) -> bool:
    """Whether a number is finite and keeps the bounds of its annotation."""
    if not math.isfinite(value):
        return False
    bounds: dict[type, Any] = {type(each): each for each in metadata_of(hint)}
    return (
        (Ge not in bounds or value >= bounds[Ge].ge)
        and (Gt not in bounds or value > bounds[Gt].gt)
        and (Le not in bounds or value <= bounds[Le].le)
    )


def refusal(name: str, hint: Any, value: object) -> str:
    """Why a value outside its bounds was refused: its name, what is allowed, what was given, what to give."""
    bounds = allowed(hint)
    if isinstance(value, float) and math.isinf(value):
        bounds = f"finite and {bounds}" if bounds else "a finite number"
    advice = sentence_of(hint).partition("; ")[2]
    return f"{name} must be {bounds or 'a finite number'}, got {value!r}" + (f"; {advice}" if advice else "")


def check_bounds(cls: type, carrier: Any) -> None:
    """InvalidInput for the first field of dataclass `cls` whose value in `carrier` is no number in bounds."""
    for name, hint in hints_of(cls).items():
        value = getattr(carrier, name)
        if not is_number(hint, value):
            kind = "a whole number" if _type_of(hint) is int else "a number"
            raise InvalidInput(f"{name} must be {kind}, got {value!r}")
        if not is_within(hint, value):
            raise InvalidInput(refusal(name, hint, value))


def hints_of(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields, with their bounds, in the order of the fields."""
    if cls not in _HINTS:
        hints = typing.get_type_hints(cls, include_extras=True)
        _HINTS[cls] = {each.name: hints[each.name] for each in dataclasses.fields(cls)}
    return _HINTS[cls]


def _type_of(hint: Any) -> type:
    kind: type = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    return kind


_HINTS: dict[type, dict[str, Any]] = {}
