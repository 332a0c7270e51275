"""The definition of `lowrank_linear`, and how it runs on a CPU.

Shapes: B texts, R rows of each, I and O numbers in and out, r rank.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def add_lowrank(
    base_BRO: Tensor, x_BRI: Tensor, down_rI: Tensor, up_Or: Tensor, first_row: int, scale: float
) -> Tensor:
    """base + scale * up(down(x)) on the rows from `first_row` on, multiplied in the type of x."""
    narrow_BMr = F.linear(x_BRI[:, first_row:], down_rI.to(x_BRI.dtype))
    change_BMO = F.linear(narrow_BMr, up_Or.to(x_BRI.dtype))
    if scale != 1:
        change_BMO = change_BMO * scale
    if not torch.is_grad_enabled():
        base_BRO[:, first_row:].add_(change_BMO)
        return base_BRO
    changed_BMO = base_BRO[:, first_row:] + change_BMO
    return changed_BMO if first_row == 0 else torch.cat([base_BRO[:, :first_row], changed_BMO], dim=1)
