"""Lists that are given as one text, separated by commas."""

import re

from blockroll.errors import InvalidInput


def split_plans(text: str) -> list[str]:
    """Plans at the commas that stand outside parentheses."""
    return re.split(r",(?![^(]*\))", text)


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InvalidInput(f"{option} takes whole numbers separated by commas, got {text!r}") from None


def numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InvalidInput(f"{option} takes numbers separated by commas, got {text!r}") from None
