"""Experiments on kernels.

python -m benchmarks.evidence kernels compiled
"""

from collections.abc import Callable

from benchmarks.rows import Row
from tests.compiled import compile_all


def experiments() -> dict[str, Callable[[], list[Row]]]:
    """Every experiment by the name of its result file."""
    return {"compiled": compile_all}
