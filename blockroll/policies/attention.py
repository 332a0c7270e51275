"""blockroll's attention, registered with transformers under one name.

Every forward of a policy says once which keys its rows see, so one function serves prefill, verify and draft
rows. The registered mask function is transformers' own for `sdpa`: a model left on this name
still honours 2-D padding masks.

Shapes: B requests, H query heads, G key-value heads, R query rows, S keys, D head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from blockroll.kernels.block_attention import (
    AttendedRows,
    BlockRows,
    block_attention,
    masked_attention,
    window_attention,
)

ATTENTION_NAME = "blockroll"


class _Options(TypedDict):
    scaling: float | None
    softcap: float | None
    dropout: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Attended:
    """What the rows of one forward see, in each layer."""

    rows: AttendedRows
    sliding_windows: Sequence[int | None]  # of each layer

    def mask(self, layer: int) -> Tensor:
        """Bool (B, 1, R, S), contiguous; of packed rows, of the rectangle that they would be."""
        return self.rows.mask(self.sliding_windows[layer])

    def outputs(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """`window_attention` of a layer's rows, or `block_attention` where prefixes are read from pages."""
        rows, window = self.rows, self.sliding_windows[layer]
        if not isinstance(rows, BlockRows) or rows.pages is None:
            return window_attention(
                query,
                key,
                value,
                rows,
                scaling=scaling,
                softcap=softcap,
                sliding_window=window,
                dropout=dropout,
            )
        output = block_attention(
            query.to(key.dtype),  # under autocast some norms give float32
            key,
            value,
            rows.pages(layer),
            rows.layout,
            rows.lengths_B,
            packing=rows.packing,
            scaling=scaling,
            softcap=softcap,
            sliding_window=window,
        )
        return output.to(query.dtype)


def attend(
    module: nn.Module,
    query_BHRD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    attended: Attended | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers asks for it in each layer; (B, R, H, D).

    A policy's forward says what is `attended`; other forwards of the model have a boolean mask (B, 1, R, S),
    or none. `softcap` c bends the scores to c * tanh(score / c) before the softmax (Gemma 2, section 2).
    """
    given = (query_BHRD, key_BGSD, value_BGSD)
    options: _Options = {"scaling": scaling, "softcap": softcap, "dropout": dropout}
    if attended is None:
        return masked_attention(*given, attention_mask, **options), None
    layer: Any = module.layer_idx
    return attended.outputs(layer, *given, **options), None


def register() -> None:
    """Make the name known to transformers; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, attend)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
