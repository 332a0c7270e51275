"""blockroll's attention, registered with transformers under one name.

Every forward of a policy says once which keys its rows see, so one function serves prefill, verify and draft
rows. The registered mask function is transformers' own for `sdpa`: a model left on this name
still honours 2-D padding masks.

Shapes: B requests, H query heads, G key-value heads, R query rows, S keys, D head width; N packed rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from blockroll.kernels.block_attention import AttendedRows, folded_mask, masked_attention, window_attention
from blockroll.policies.packing import Packing

ATTENTION_NAME = "blockroll"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attended:
    """What the rows of one forward see, in each layer."""

    rows: AttendedRows
    sliding_windows: Sequence[int | None]  # of each layer
    packing: Packing | None = None  # None: all requests have as many rows

    def mask(self, layer: int) -> Tensor:
        """Bool (B, 1, R, S), contiguous; of packed rows, of the rectangle that they would be."""
        return self.rows.mask(self.sliding_windows[layer])

    def outputs(
        self,
        layer: int,
        query_BHRD: Tensor,
        key_BGSD: Tensor,
        value_BGSD: Tensor,
        *,
        scaling: float | None,
        softcap: float | None,
        dropout: float = 0.0,
    ) -> Tensor:
        """What a layer's rows attend to, (B, R, H, D); of packed ones, (1, H, N, D), it is (1, N, H, D).

        Packed rows go band by band: of all requests the first rows, then of some what they have behind those.
        """
        packing, sliding_window = self.packing, self.sliding_windows[layer]
        options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "dropout": dropout}
        if packing is None:
            given = (query_BHRD, key_BGSD, value_BGSD, self.rows)
            return window_attention(*given, sliding_window=sliding_window, **options)
        repeats = query_BHRD.shape[1] // key_BGSD.shape[1]
        mask_MS = self.rows.once(
            ("packed", sliding_window, repeats), lambda: _packed_mask(self.mask(layer), packing, repeats)
        )
        num_rows = [
            band.size * (band.width if band.width == 1 else repeats * band.width) for band in packing.bands
        ]
        outputs = [
            masked_attention(
                query_BLHD.transpose(1, 2),
                band.of(key_BGSD),
                band.of(value_BGSD),
                mask_mS.view(band.size, 1, -1, mask_mS.shape[-1]),
                **options,
            )
            for band, query_BLHD, mask_mS in zip(
                packing.bands,
                packing.by_band(query_BHRD.transpose(1, 2)),
                torch.split(mask_MS, num_rows),
                strict=True,
            )
        ]
        return packing.from_bands(outputs)


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
    options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "dropout": dropout}
    if attended is None:
        return masked_attention(*given, attention_mask, **options), None
    layer: Any = module.layer_idx
    return attended.outputs(layer, *given, **options), None


def _packed_mask(mask_B1LS: Tensor, packing: Packing, repeats: int) -> Tensor:
    """The masks of its bands, each folded, one behind the other: (M, S)."""
    return torch.cat(
        [
            folded_mask(band.of(mask_B1LS[:, :, band.first : band.first + band.width]), repeats).flatten(0, 2)
            for band in packing.bands
        ]
    )


def register() -> None:
    """Make the name known to transformers; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, attend)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
