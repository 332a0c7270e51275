"""A linear layer with a low-rank update on the last rows of each text, and on no other.

Shapes: B texts, R rows of each, I and O numbers in and out, r rank.
"""

import torch
from torch import Tensor

from blockroll.errors import InvalidInput
from blockroll.kernels.choice import is_triton
from blockroll.kernels.lowrank_linear import reference

__all__ = ["lowrank_linear"]

SERVED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_RANK = 128  # of what a kernel keeps in registers


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

    Triton makes it in one launch, rounding once where the definition rounds each product, without gradients
    only: with them the definition runs. InvalidInput for types and strides that its kernel does not serve,
    and for a rank over 128.
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
    if is_triton() and not torch.is_grad_enabled():
        _check_served(base_BRO, x_BRI, down_rI, up_Or)
        from blockroll.kernels.lowrank_linear import fused

        return fused.add_lowrank(base_BRO, x_BRI, down_rI, up_Or, first_row, scale)
    return reference.add_lowrank(base_BRO, x_BRI, down_rI, up_Or, first_row, scale)


def _check_served(base_BRO: Tensor, x_BRI: Tensor, down_rI: Tensor, up_Or: Tensor) -> None:
    """InvalidInput for what no kernel was built for."""
    kind = x_BRI.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_BRI.dtype
    factors = {down_rI.dtype, up_Or.dtype}
    if dtype not in SERVED_TYPES or base_BRO.dtype != dtype or factors != {torch.float32}:
        raise InvalidInput(
            f"x is multiplied in {dtype}, base(x) is {base_BRO.dtype}, down {down_rI.dtype} and up "
            f"{up_Or.dtype}: Triton's kernel serves x and base(x) of one type, float32, bfloat16 or float16, "
            "beside factors in float32; convert them, or set kernels='reference'"
        )
    if len(down_rI) > MAX_RANK:
        raise InvalidInput(
            f"the rank is {len(down_rI)}: Triton's kernel serves up to {MAX_RANK}; set kernels='reference'"
        )
    named = {"base_BRO": base_BRO, "x_BRI": x_BRI}
    split = [name for name, rows in named.items() if rows.stride(2) != 1 and rows.shape[2] > 1]
    split += [name for name, each in (("down_rI", down_rI), ("up_Or", up_Or)) if not each.is_contiguous()]
    if split:
        raise InvalidInput(
            f"rows of {', '.join(split)} are not contiguous, and Triton's kernel reads no others: give it "
            "their .contiguous(), or set kernels='reference'"
        )
