"""The definition of `cache_write`, and how it runs on a CPU.

Shapes: B requests, G key heads, R new rows, C of them written to pages, D head width; N pages, Z rows of a
page.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from blockroll.kernels.pages import Pages


class Places(NamedTuple):
    """Where new rows go, int64 (B, C)."""

    page_BC: Tensor
    row_BC: Tensor
    has_gaps: bool  # whether any of these pages may be page 0, which is nobody's


def places_of(
    table_BT: Tensor, page_size: int, index_BC: Tensor, request_BC: Tensor | None, has_gaps: bool
) -> Places:
    """Row t of a request lies in its page t // page_size, at t % page_size."""
    place_BC, row_BC = index_BC // page_size, index_BC % page_size
    if has_gaps:
        place_BC = place_BC.clamp(min=0)
    page_BC = table_BT.gather(1, place_BC) if request_BC is None else table_BT[request_BC, place_BC]
    if has_gaps:
        page_BC = page_BC.masked_fill(index_BC < 0, 0)
    return Places(page_BC, row_BC, has_gaps)


def write(
    key_BGRD: Tensor,
    value_BGRD: Tensor,
    pages: Pages,
    places: Places,
    scratch: tuple[Tensor, Tensor] | None,
    rotary: tuple[Tensor, Tensor] | None,
) -> None:
    """Rows that have a place to it, those behind them to scratch."""
    if rotary is not None:
        key_BGRD.copy_(rotated(key_BGRD, *rotary))
    num_placed = places.page_BC.shape[1]
    is_nobodys = (places.page_BC == 0)[..., None, None] if places.has_gaps else None
    for held_NGZD, new_BGRD in ((pages.keys_NGZD, key_BGRD), (pages.values_NGZD, value_BGRD)):
        rows_BCGD = new_BGRD[:, :, :num_placed].transpose(1, 2)
        if is_nobodys is not None:
            rows_BCGD = rows_BCGD.masked_fill(is_nobodys, 0)
        # Under autocast some norms give float32; attention would round it likewise.
        held_NGZD.transpose(1, 2)[places.page_BC, places.row_BC] = rows_BCGD.to(held_NGZD.dtype)
    if scratch is not None:
        for spare_BGMD, new_BGRD in zip(scratch, (key_BGRD, value_BGRD), strict=True):
            spare_BGMD.copy_(new_BGRD[:, :, num_placed:])


def rotated(x_BGRD: Tensor, cos_BRD: Tensor, sin_BRD: Tensor) -> Tensor:
    """Pairs (i, i + D / 2) turned by the angles of their row, each product rounded to the type of x.

    Source: RoFormer (arXiv 2104.09864), section 3.2, with halves for pairs as Llama and Qwen have them.
    """
    first, second = x_BGRD.chunk(2, dim=-1)
    turned_BGRD = torch.cat([-second, first], dim=-1)
    return x_BGRD * cos_BRD[:, None] + turned_BGRD * sin_BRD[:, None]
