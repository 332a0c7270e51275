"""blockroll's attention, registered with transformers under one name.

Every forward of a policy brings its mask and its positions, so one function serves prefill, verify and
draft rows. The registered mask function is transformers' own for `sdpa`: a model left on this name
still honours 2-D padding masks.

Shapes: B requests, H query heads, G key-value heads, R query rows, S keys, D head width; N packed rows.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from blockroll.policies.packing import Packing

ATTENTION_NAME = "blockroll"


def block_attention(
    module: nn.Module,
    query_BHRD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Softmax attention under a boolean mask (B, 1, R, S), True where a row may attend; (B, R, H, D).

    A mask that `folded_mask` has made for all layers, (B, 1, H / G * R, S), saves folding it in each.
    `softcap` c bends the scores to c * tanh(score / c) before the softmax (Gemma 2, section 2).
    With a `packing`, queries (1, H, N, D) come and (1, N, H, D) goes back; the mask is `packed_mask`'s.
    """
    if packing is not None:
        return _packed_attention(
            module,
            query_BHRD,
            key_BGSD,
            value_BGSD,
            attention_mask,
            packing,
            scaling=scaling,
            dropout=dropout,
            softcap=softcap,
        ), None
    rows = query_BHRD.shape[2]
    if softcap is not None:
        output_BHRD = _capped_attention(
            query_BHRD,
            key_BGSD,
            value_BGSD,
            None if attention_mask is None else attention_mask[:, :, :rows],
            scaling=scaling,
            softcap=softcap,
        )
        return output_BHRD.transpose(1, 2).contiguous(), None
    repeats = query_BHRD.shape[1] // key_BGSD.shape[1]
    if repeats > 1 and attention_mask is not None:
        # Query heads of one group become rows of one head: its keys and values are read once.
        if attention_mask.shape[2] == rows:
            attention_mask = folded_mask(attention_mask, repeats)
        folded = scaled_dot_product_attention(
            query_BHRD.reshape(len(query_BHRD), key_BGSD.shape[1], repeats * rows, -1),
            key_BGSD,
            value_BGSD,
            attn_mask=attention_mask,
            dropout_p=dropout,
            scale=scaling,
        )
        return folded.reshape(query_BHRD.shape).transpose(1, 2).contiguous(), None
    output_BHRD = scaled_dot_product_attention(
        query_BHRD,
        key_BGSD,
        value_BGSD,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=attention_mask is None and rows > 1,
        enable_gqa=query_BHRD.shape[1] != key_BGSD.shape[1],
    )
    return output_BHRD.transpose(1, 2).contiguous(), None


def folded_mask(mask_B1RS: Tensor, repeats: int) -> Tensor:
    """The mask (B, 1, repeats * R, S) of as many query heads folded into one; one row stands for all."""
    return mask_B1RS if mask_B1RS.shape[2] == 1 else mask_B1RS.repeat(1, 1, repeats, 1)


def folded_masks(masks: Tensor | Mapping[str, Tensor], repeats: int) -> Tensor | dict[str, Tensor]:
    """The same of one mask, or of one for each kind of layer."""
    if isinstance(masks, Tensor):
        return folded_mask(masks, repeats)
    return {kind: folded_mask(mask, repeats) for kind, mask in masks.items()}


def packed_mask(mask_B1LS: Tensor, packing: Packing, repeats: int) -> Tensor:
    """The masks of its bands, each folded, one behind the other: (1, 1, rows, S)."""
    masks = [
        folded_mask(band.of(mask_B1LS[:, :, band.first : band.first + band.width]), repeats).flatten(0, 2)
        for band in packing.bands
    ]
    return torch.cat(masks)[None, None]


def _packed_attention(
    module: nn.Module,
    query_1HND: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    mask_11MS: Tensor | None,
    packing: Packing,
    **options: Any,
) -> Tensor:
    """Band by band: of all requests the first rows, then of some what they have behind those."""
    assert mask_11MS is not None, "each band has a mask"
    repeats = query_1HND.shape[1] // key_BGSD.shape[1]
    rows = [band.size * (band.width if band.width == 1 else repeats * band.width) for band in packing.bands]
    masks = torch.split(mask_11MS[0, 0], rows)
    queries = packing.by_band(query_1HND.transpose(1, 2))
    outputs = [
        block_attention(
            module,
            query_BLHD.transpose(1, 2),
            band.of(key_BGSD),
            band.of(value_BGSD),
            mask_MS.view(band.size, 1, -1, mask_MS.shape[-1]),
            **options,
        )[0]
        for band, query_BLHD, mask_MS in zip(packing.bands, queries, masks, strict=True)
    ]
    return packing.from_bands(outputs)


def _capped_attention(
    query_BHRD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    mask_B1RS: Tensor | None,
    *,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """In plain torch, because its fused attention has no soft cap; softmax in float32."""
    rows, repeats = query_BHRD.shape[2], query_BHRD.shape[1] // key_BGSD.shape[1]
    key_BHSD = key_BGSD.repeat_interleave(repeats, dim=1)
    value_BHSD = value_BGSD.repeat_interleave(repeats, dim=1)
    scale = query_BHRD.shape[-1] ** -0.5 if scaling is None else scaling
    scores_BHRS = torch.tanh(query_BHRD @ key_BHSD.transpose(2, 3) * scale / softcap) * softcap
    if mask_B1RS is None:
        keys = key_BHSD.shape[2]
        mask_B1RS = torch.ones((rows, keys), dtype=torch.bool, device=query_BHRD.device).tril(keys - rows)
    scores_BHRS = scores_BHRS.masked_fill(~mask_B1RS, torch.finfo(scores_BHRS.dtype).min)
    return scores_BHRS.softmax(dim=-1, dtype=torch.float32).to(query_BHRD.dtype) @ value_BHSD


def register() -> None:
    """Make the name known to transformers; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, block_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
