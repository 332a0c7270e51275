"""Two ranges that overlap show no difference: the one rule of every sentence that compares."""

from collections.abc import Sequence

import numpy as np


def overlap(left: Sequence[float], right: Sequence[float]) -> bool:
    """Whether the ranges of two sets of runs have a value in common."""
    return min(left) <= max(right) and min(right) <= max(left)


def median_and_range(values: Sequence[float], *, digits: int = 2) -> str:
    """Median, and range where there is more than one."""
    median = f"{np.median(values):.{digits}f}"
    if len(values) < 2:
        return median
    return f"{median} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratio(values: Sequence[float]) -> str:
    """A ratio of times by its median; where the range of its runs holds 1 it says so."""
    holds_one = len(values) > 1 and overlap(values, [1.0])
    return f"{np.median(values):.2f}x{' (no difference: its range holds 1)' if holds_one else ''}"


def listed(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last
