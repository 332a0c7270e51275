"""What a request brings along, asked and its answers checked: they fail that request by name, and no other.

Shapes: N rows, T tokens of a text, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from blockroll.errors import RequestFailed
from blockroll.types import Guide, LogitsProcessor

_SHORTAGES = (MemoryError, torch.OutOfMemoryError)  # of the whole batch: its engine makes that smaller


def allowed_rows(guide: Guide, drafts: Sequence[int], first: int, vocab_size: int) -> Tensor:
    """As `Guide.allowed`; RequestFailed where it gives no masks."""
    try:
        allowed = guide.allowed(drafts, first)
    except _SHORTAGES:
        raise
    except Exception as error:
        raise RequestFailed(f"its constraint raised {error!r}") from error
    num_rows = len(drafts) - first + 1
    is_mask = isinstance(allowed, Tensor) and allowed.dtype == torch.bool and allowed.ndim == 2
    if not is_mask or not 0 < len(allowed) <= num_rows or allowed.shape[1] != vocab_size:
        raise RequestFailed(
            f"its constraint gave {_form(allowed)} where masks of 1 to {num_rows} rows were asked: bool "
            f"({num_rows}, {vocab_size})"
        )
    return allowed


def processed(processors: Sequence[LogitsProcessor], ids_1T: Tensor, row_V: Tensor) -> Tensor:
    """What logits processors, one after the other, make of a row; RequestFailed where that is no row."""
    scores_1V = row_V[None].clone()
    for processor in processors:
        name = f"its logits processor {type(processor).__name__}"
        try:
            given = processor(ids_1T.clone(), scores_1V)
        except _SHORTAGES:
            raise
        except Exception as error:
            raise RequestFailed(f"{name} raised {error!r}") from error
        if not isinstance(given, Tensor) or given.shape != (1, len(row_V)):
            raise RequestFailed(f"{name} gave {_form(given)} for scores of shape (1, {len(row_V)})")
        scores_1V = given.to(row_V)
    best = float(scores_1V.amax())
    if math.isnan(best) or best == math.inf:
        raise RequestFailed("its logits processors gave NaN or infinity; what may not be drawn has -inf")
    return scores_1V[0]


def _form(given: object) -> str:
    if isinstance(given, Tensor):
        return f"{str(given.dtype).removeprefix('torch.')} {tuple(given.shape)}"
    return type(given).__name__
