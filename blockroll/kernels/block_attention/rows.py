"""What attention is told of the rows of one forward, in every layer.

Shapes: B requests, R rows, S keys.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from torch import Tensor

from blockroll.kernels.block_attention.layout import RowLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendedRows:
    """Rows of which their mask is known; it is made where it is needed, once for all layers of a kind."""

    # By sliding window, bool (B, 1, R, S), True where a row attends.
    make_mask: Callable[[int | None], Tensor]
    _made: dict[Hashable, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def mask(self, sliding_window: int | None) -> Tensor:
        """The mask of layers with this window, contiguous."""
        return self.once(sliding_window, lambda: self.make_mask(sliding_window).contiguous())

    def folded_mask(self, sliding_window: int | None, repeats: int) -> Tensor:
        """The mask (B, 1, repeats * R, S) of as many query heads folded into one."""
        return self.once((sliding_window, repeats), lambda: folded_mask(self.mask(sliding_window), repeats))

    def once(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
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

    @classmethod
    def of(cls, layout: RowLayout, lengths_B: Tensor, extent: int) -> "BlockRows":
        """Where keys come in the order of the cache, `extent` of them."""

        def make_mask(sliding_window: int | None) -> Tensor:
            return layout.mask(lengths_B, extent, sliding_window=sliding_window)

        return cls(make_mask=make_mask, layout=layout, lengths_B=lengths_B)


def folded_mask(mask_B1RS: Tensor, repeats: int) -> Tensor:
    """Query heads of one key head as rows of one; where there is one row, it stands for all."""
    return mask_B1RS if repeats == 1 or mask_B1RS.shape[2] == 1 else mask_B1RS.repeat(1, 1, repeats, 1)
