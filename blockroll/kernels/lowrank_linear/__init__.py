"""A linear layer with a low-rank update on the last rows of each text, and on no other.

Shapes: B texts, R rows of each, I and O numbers in and out, r rank.
"""

from torch import Tensor

from blockroll.errors import InvalidInput
from blockroll.kernels.lowrank_linear import reference

__all__ = ["lowrank_linear"]


def lowrank_linear(
    base_BRO: Tensor,
    x_BRI: Tensor,
    down_rI: Tensor,
    up_Or: Tensor,
    *,
    first_row: int,
    scale: float = 1.0,
) -> Tensor:
    """base(x) + scale * up(down(x)) on the rows from `first_row` on; earlier ones are base(x), bit for bit.

    `base_BRO` is base(x), by whatever multiplies it; without gradients it is overwritten. The update is
    multiplied in the type of x. InvalidInput where shapes do not belong together.
    """
    (rank, width), (out, up_rank) = down_rI.shape, up_Or.shape
    size, rows, _ = x_BRI.shape
    if x_BRI.shape[2] != width or base_BRO.shape != (size, rows, out) or rank != up_rank:
        raise InvalidInput(
            f"base(x) has shape {tuple(base_BRO.shape)}, x {tuple(x_BRI.shape)}, down {(rank, width)} and up "
            f"{(out, up_rank)}: give (B, R, O), (B, R, I), (r, I) and (O, r)"
        )
    if not 0 <= first_row <= rows:
        raise InvalidInput(f"first_row is {first_row}: it is 0 to {rows}, the rows of a text")
    return reference.add_lowrank(base_BRO, x_BRI, down_rI, up_Or, first_row, scale)
