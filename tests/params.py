"""Which cases of a broad test `make test` runs, and which are left to `make test-slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_beyond(count: int, values: Iterable[Any]) -> list[Any]:
    """The first `count` values as they are, the others marked slow."""
    first, others = list(values)[:count], list(values)[count:]
    return [*first, *(pytest.param(value, marks=pytest.mark.slow) for value in others)]
