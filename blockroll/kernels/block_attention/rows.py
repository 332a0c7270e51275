"""What attention is told of the rows of one forward, in every layer.

Shapes: B requests, R rows, L of the request that has most, S keys, M rows of the masks of all bands.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from blockroll.kernels.block_attention.layout import RowLayout
from blockroll.kernels.block_attention.packing import Packing
from blockroll.kernels.pages import Pages


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendedRows:
    """Rows of which their mask is known; it is made where it is needed, once for all layers of a kind."""

    # By sliding window, bool (B, 1, R, S), True where a row attends.
    make_mask: Callable[[int | None], Tensor]
    packing: Packing | None = None  # of rows in place of a rectangle's
    _made: dict[Hashable, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def mask(self, sliding_window: int | None) -> Tensor:
        """The mask of layers with this window, contiguous; of packed rows, of the rectangle they would be."""
        made = self._made.get(sliding_window)
        if made is None:
            made = self._made[sliding_window] = self.make_mask(sliding_window).contiguous()
        return made

    def folded_mask(self, sliding_window: int | None, repeats: int) -> Tensor:
        """The mask (B, 1, repeats * R, S) of as many query heads folded into one."""
        return self._once((sliding_window, repeats), lambda: _folded(self.mask(sliding_window), repeats))

    def band_masks(self, sliding_window: int | None, repeats: int) -> Sequence[Tensor]:
        """Such a mask of each band of packed rows."""
        packing = self.packing
        assert packing is not None
        mask_MS = self._once(
            ("bands", sliding_window, repeats), lambda: _of_bands(self.mask(sliding_window), packing, repeats)
        )
        counts = [
            band.size * (band.width if band.width == 1 else repeats * band.width) for band in packing.bands
        ]
        return [
            mask_mS.view(band.size, 1, -1, mask_mS.shape[-1])
            for band, mask_mS in zip(packing.bands, torch.split(mask_MS, counts), strict=True)
        ]

    def _once(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What is made of masks, kept for the layers behind this one."""
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = make()
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRows(AttendedRows):
    """Rows of a layout behind prefixes of these lengths: integers are all that a kernel needs of them."""

    layout: RowLayout
    lengths_B: Tensor  # int64, rows of each prefix; below 0 for a text that begins so many rows later
    pages: Callable[[int], Pages] | None = None  # of each layer, where prefixes are read from them

    @classmethod
    def of(
        cls,
        layout: RowLayout,
        lengths_B: Tensor,
        extent: int,
        packing: Packing | None = None,
        pages: Callable[[int], Pages] | None = None,
    ) -> "BlockRows":
        """Where keys come in the order of the cache, `extent` of them, or their prefixes lie in pages."""

        def make_mask(sliding_window: int | None) -> Tensor:
            return layout.mask(lengths_B, extent, sliding_window=sliding_window)

        return cls(make_mask=make_mask, layout=layout, lengths_B=lengths_B, packing=packing, pages=pages)


def _folded(mask_B1RS: Tensor, repeats: int) -> Tensor:
    """Query heads of one key head as rows of one; where there is one row, it stands for all."""
    return mask_B1RS if repeats == 1 or mask_B1RS.shape[2] == 1 else mask_B1RS.repeat(1, 1, repeats, 1)


def _of_bands(mask_B1LS: Tensor, packing: Packing, repeats: int) -> Tensor:
    """The masks of all bands, each folded, one behind the other: (M, S)."""
    return torch.cat(
        [
            _folded(band.of(mask_B1LS[:, :, band.first : band.first + band.width]), repeats).flatten(0, 2)
            for band in packing.bands
        ]
    )
