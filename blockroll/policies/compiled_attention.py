"""Attention of compiled layers: by the compiled code where it can read keys and masks where they lie.

Shapes: B requests, H query heads, G key heads, R query rows, S keys, D head width; N packed rows; M rows
of a mask: 1, R, or R for each query head of a key head.
"""

from ctypes import CDLL

import torch
from torch import Tensor

from blockroll.policies import attention
from blockroll.policies.layer_shape import LayerAttention
from blockroll.policies.packing import Packing


def attended_rows(
    library: CDLL,
    model_at: int,
    layer: LayerAttention,
    query_BHRD: Tensor,
    keys_BGSD: Tensor,
    values_BGSD: Tensor,
    mask_B1MS: Tensor,
    packing: Packing | None,
) -> Tensor:
    """What a layer's attention gives, (B, R, H, D); with a packing (1, N, H, D)."""
    size, heads, rows, width = query_BHRD.shape
    num_keys = keys_BGSD.shape[2]
    is_read_in_place = (
        packing is None
        and mask_B1MS.dtype == torch.bool
        and mask_B1MS.is_contiguous()
        and mask_B1MS.shape[0] == len(keys_BGSD) == size
        and keys_BGSD.stride() == values_BGSD.stride()
        and keys_BGSD.stride()[2:] == (width, 1)
        and keys_BGSD.dtype == values_BGSD.dtype == query_BHRD.dtype
    )
    if not is_read_in_place:
        attended, _ = attention.block_attention(
            layer.module,
            query_BHRD,
            keys_BGSD,
            values_BGSD,
            mask_B1MS,
            scaling=layer.scaling,
            softcap=layer.softcap,
            packing=packing,
        )
        return attended.contiguous()
    mask_rows = mask_B1MS.shape[2]
    space = torch.empty(size * heads * rows * (num_keys + 4 + width), dtype=torch.float32)
    attended_BRHD = query_BHRD.new_empty((size, rows, heads, width))
    library.attend(
        model_at,
        query_BHRD.data_ptr(),
        keys_BGSD.data_ptr(),
        values_BGSD.data_ptr(),
        size,
        rows,
        num_keys,
        keys_BGSD.stride(0),
        keys_BGSD.stride(1),
        mask_B1MS.data_ptr(),
        mask_rows,
        mask_rows * num_keys,
        layer.scaling,
        layer.softcap or 0.0,
        space.data_ptr(),
        attended_BRHD.data_ptr(),
        torch.get_num_threads(),
    )
    return attended_BRHD
