"""Whether compiled layers may serve: the law that they give, beside that of the model's own forward."""

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockroll.policies.prepacked import law_gap
from blockroll.policies.rounding import nudged_inputs

logger = logging.getLogger(__name__)

_ROUNDING_MARGIN = 3  # times what rounding alone does to the model's own law: it may differ by as much


def is_same_law(
    model: PreTrainedModel,
    dtype: torch.dtype,
    law: Callable[[], Tensor],
    serve: Callable[[bool], None],
    otherwise: str,
) -> bool:
    """Whether logits (..., V) that `law` gives are the model's own while compiled layers `serve`.

    They do not serve when this returns. Where laws differ, a warning says what is `otherwise`.
    """
    serve(False)
    expected = law()
    with nudged_inputs(model, dtype):
        own_gap, bound = law_gap(expected, law(), dtype)
    if math.isfinite(own_gap):
        bound = max(bound, _ROUNDING_MARGIN * own_gap)
    serve(True)
    try:
        gap, _ = law_gap(expected, law(), dtype)
    finally:
        serve(False)
    if gap <= bound:  # NaN is no agreement
        return True
    logger.warning("%s: log-probabilities move by %.1e with them, and %.1e is allowed", otherwise, gap, bound)
    return False
