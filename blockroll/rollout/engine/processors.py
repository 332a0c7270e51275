"""Whether a logits processor is a function of what it is given.

Verifying a block asks for several positions at once, some of them for drafts that are then rejected: what a
processor remembers of its calls would be wrong. What it prepares once, whatever it is given first, is none.
"""

import copy
import pickle
from collections import deque
from typing import Any

import numpy as np
import torch

from blockroll.errors import InvalidInput
from blockroll.types import LogitsProcessor

_probed: deque[tuple[LogitsProcessor, int]] = deque(maxlen=64)  # processors that passed, by vocabulary
_ADVICE = (
    "write it as a function of input_ids (1, T) and scores (1, V) alone, or as a constraint, whose guide "
    "is told which tokens were committed"
)


def check_processor(processor: LogitsProcessor, vocab_size: int) -> None:
    """Raise InvalidInput for a logits processor that is not a function of the ids and scores it is given.

    Two copies of it are called on made-up rows, in different orders: equal calls must give equal scores, and
    in the end the copies must be equal. One that cannot be copied is called itself.
    """
    if any(known is processor and size == vocab_size for known, size in _probed):
        return
    name = f"logits processor {type(processor).__name__}"
    short, long = torch.tensor([[0]]), torch.tensor([[0, vocab_size - 1, 0]])
    first, second = _copy(processor), _copy(processor)
    results = [
        _call(each, ids_1T, vocab_size) for each, ids_1T in ((first, short), (first, long), (first, short))
    ]
    others = [_call(second, ids_1T, vocab_size) for ids_1T in (long, short)]
    if any(not torch.is_tensor(each) or each.shape != (1, vocab_size) for each in (*results, *others)):
        raise InvalidInput(f"{name} does not return scores of the shape it was given, (1, {vocab_size})")
    is_function = torch.equal(results[0], results[2]) and all(map(torch.equal, results[1:], others))
    if not is_function or not _is_same(first, second, depth=0):
        raise InvalidInput(f"{name} has state of its own that a call changes; {_ADVICE}")
    _probed.append((processor, vocab_size))


def _call(processor: LogitsProcessor, ids_1T: torch.Tensor, vocab_size: int) -> torch.Tensor:
    scores_1V = torch.linspace(-1, 1, vocab_size, dtype=torch.float64)[None]
    try:
        return processor(ids_1T.clone(), scores_1V)
    except Exception as error:
        name = f"logits processor {type(processor).__name__}"
        raise InvalidInput(f"{name} cannot be evaluated for one row at a time: {error}; {_ADVICE}") from error


def _copy(processor: LogitsProcessor) -> LogitsProcessor:
    try:
        return copy.deepcopy(processor)
    except (TypeError, AttributeError, RuntimeError, pickle.PicklingError):
        return processor


def _is_same(left: Any, right: Any, *, depth: int) -> bool:
    """Whether two objects hold the same, as far as can be seen."""
    if left is right or depth > 8:
        return True
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        if left.is_floating_point() and left.shape == right.shape:
            return bool(torch.allclose(left, right, rtol=0, atol=0, equal_nan=True))
        return bool(torch.equal(left, right))
    if isinstance(left, np.ndarray):
        return bool(np.array_equal(left, right))
    if isinstance(left, torch.Generator):
        return bool(torch.equal(left.get_state(), right.get_state()))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(
            _is_same(left[key], right[key], depth=depth + 1) for key in left
        )
    if isinstance(left, list | tuple | deque):
        return len(left) == len(right) and all(
            _is_same(mine, other, depth=depth + 1) for mine, other in zip(left, right, strict=True)
        )
    if hasattr(left, "__dict__") and not isinstance(left, type):
        return _is_same(vars(left), vars(right), depth=depth + 1)
    # What only compares by identity cannot be looked into.
    return "__eq__" not in vars(type(left)) or bool(left == right)
