"""blockroll's attention, registered with transformers under one name.

Every forward of a policy brings its mask and its positions, so one function serves prefill, verify and
draft rows. The registered mask function is transformers' own for `sdpa`: a model left on this name
still honours 2-D padding masks.

Shapes: B requests, H query heads, R query rows, S keys, D head width.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "blockroll"


def block_attention(
    module: nn.Module,
    query_BHRD: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Softmax attention under a boolean mask (B, 1, R, S), True where a row may attend."""
    rows = query_BHRD.shape[2]
    output_BHRD = scaled_dot_product_attention(
        query_BHRD,
        key_BHSD,
        value_BHSD,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=attention_mask is None and rows > 1,
        enable_gqa=query_BHRD.shape[1] != key_BHSD.shape[1],
    )
    return output_BHRD.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make the name known to transformers; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, block_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
