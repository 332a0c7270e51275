"""Attention of compiled layers: by the compiled code where it can read keys and masks where they lie.

Shapes: B requests, H query heads, G key heads, R query rows, S keys, D head width; N packed rows.
"""

from ctypes import CDLL

import torch
from torch import Tensor

from blockroll.policies.attention import Attended
from blockroll.policies.layer_shape import LayerAttention


def attended_rows(
    library: CDLL,
    model_at: int,
    layer: LayerAttention,
    query_BHRD: Tensor,
    keys_BGSD: Tensor,
    values_BGSD: Tensor,
    attended: Attended,
    index: int,
) -> Tensor:
    """What the attention of a layer, the `index`-th, gives: (B, R, H, D); of packed rows (1, N, H, D)."""
    size, heads, num_rows, width = query_BHRD.shape
    num_keys = keys_BGSD.shape[2]
    is_read_in_place = (
        attended.rows.packing is None
        and keys_BGSD.stride() == values_BGSD.stride()
        and keys_BGSD.stride()[2:] == (width, 1)
        and keys_BGSD.dtype == values_BGSD.dtype == query_BHRD.dtype
    )
    if not is_read_in_place:
        given = (query_BHRD, keys_BGSD, values_BGSD)
        return attended.outputs(index, *given, scaling=layer.scaling, softcap=layer.softcap).contiguous()
    mask_B1RS = attended.mask(index)
    space = torch.empty(size * heads * num_rows * (num_keys + 4 + width), dtype=torch.float32)
    attended_BRHD = query_BHRD.new_empty((size, num_rows, heads, width))
    library.attend(
        model_at,
        query_BHRD.data_ptr(),
        keys_BGSD.data_ptr(),
        values_BGSD.data_ptr(),
        size,
        num_rows,
        num_keys,
        keys_BGSD.stride(0),
        keys_BGSD.stride(1),
        mask_B1RS.data_ptr(),
        num_rows,
        num_rows * num_keys,
        layer.scaling,
        layer.softcap or 0.0,
        space.data_ptr(),
        attended_BRHD.data_ptr(),
        torch.get_num_threads(),
    )
    return attended_BRHD
