"""Experiments on kernels.

python -m benchmarks.evidence kernels compiled
python -m benchmarks.evidence kernels logprob_memory
"""

from collections.abc import Callable

from benchmarks.logprob_memory import logprob_memory
from benchmarks.rows import Row
from tests.compiled import compile_all


def experiments() -> dict[str, Callable[[], list[Row]]]:
    """Every experiment by the name of its result file."""
    return {"compiled": compile_all, "logprob_memory": logprob_memory}
