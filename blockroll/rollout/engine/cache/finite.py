"""Where memory holds what is not finite."""

from collections.abc import Sequence

from torch import Tensor


def not_finite(tensors: Sequence[Tensor]) -> list[int]:
    """Places along the first dimension, which all have alike, of NaN or infinity in any of them.

    It takes no memory that grows with theirs: they are asked where memory may have run out.
    """
    if not tensors or not tensors[0].numel():
        return []
    is_bad_N = None
    for tensor in tensors:
        least_N, most_N = tensor.flatten(1).aminmax(dim=1)
        here_N = ~(least_N.isfinite() & most_N.isfinite())
        is_bad_N = here_N if is_bad_N is None else is_bad_N | here_N
    return [] if is_bad_N is None else is_bad_N.nonzero().flatten().tolist()
