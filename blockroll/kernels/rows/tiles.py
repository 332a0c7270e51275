"""What kernels know of rows once they have read them: by tile of the vocabulary, and no row of probabilities.

A weight is exp((logit - top) / temperature), `top` being a logit of its tile's that is the same wherever the
tile is read; a probability is the weight times its tile's `factor`. So every kernel that reads a tile again
meets the very numbers that were summed.

Shapes: B requests, L rows of each, T tiles, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Self

import torch
from torch import Tensor

from blockroll.errors import InvalidInput
from blockroll.kernels.choice import is_interpreted


class Shape(NamedTuple):
    """How programs divide rows."""

    rows: int  # of a program
    width: int  # of a tile
    most_tiles: int  # of a row, a power of two

    def num_tiles(self, vocab_size: int) -> int:
        return -(-vocab_size // self.width)


SHAPE = Shape(1, 4096, 128)
# What ships is one row of a program; interpreted, a program takes as long for several small ones.
INTERPRETED = Shape(8, 512, 1)
LARGEST_VOCABULARY = SHAPE.width * SHAPE.most_tiles


def shape_of(vocab_size: int) -> Shape:
    """InvalidInput for a vocabulary that has more tiles than kernels are built for."""
    if not 0 < vocab_size <= LARGEST_VOCABULARY:
        raise InvalidInput(
            f"the vocabulary has {vocab_size} tokens: Triton's kernels take 1 to {LARGEST_VOCABULARY}; use "
            "kernels='reference'"
        )
    return INTERPRETED if vocab_size <= INTERPRETED.width and is_interpreted() else SHAPE


@dataclass(frozen=True, slots=True)
class Read:
    """What one look at rows gave, and how its programs divided them."""

    shape: Shape
    num_tiles: int
    top_BLT: Tensor  # the largest logit of a tile
    sum_BLT: Tensor  # float64, of its weights by that
    fault_BLT: Tensor  # int32: whether any logit of it is NaN or infinite
    row_top_BL: Tensor  # the largest logit of a row,
    row_mass_BL: Tensor  # and the sum of its weights by that; both are put together from those of its tiles

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self.top_BLT, self.sum_BLT, self.fault_BLT


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiled:
    """Rows that kernels have read; where nobody asked for a row its factors are NaN, and nothing is wrong."""

    top_BLT: Tensor  # float32, float64 of float64 rows; infinity in rows whose law is even
    factor_BLT: Tensor  # float64, of weights to probabilities
    mass_BLT: Tensor  # float64, probability of the tile
    edge_BL: Tensor  # int32 or int64: bits of the largest gap to `top` that stays when the row is cut,
    last_BL: Tensor  # int32: and of tokens at that gap the last id that does
    fault_BL: Tensor  # int32: `RowFault`

    @property
    def tensors(self) -> Sequence[Tensor]:
        """In this order."""
        return tuple(getattr(self, each.name) for each in fields(self))

    def of(self, rows: slice) -> Self:
        """Those of some rows of each request."""
        return type(self)(**{each.name: getattr(self, each.name)[:, rows] for each in fields(self)})

    def contiguous(self) -> Self:
        """As kernels read them."""
        return type(self)(**{each.name: getattr(self, each.name).contiguous() for each in fields(self)})


def empty_tiled(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tiled:
    """Room for that of (B, L) rows over V tokens, whose logits kernels read as this type."""
    size, num_rows, vocab_size = shape
    num_tiles = shape_of(vocab_size).num_tiles(vocab_size)
    is_wide = dtype == torch.float64

    def room(*sizes: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((size, num_rows, *sizes), dtype=dtype, device=device)

    return Tiled(
        top_BLT=room(num_tiles, dtype=torch.float64 if is_wide else torch.float32),
        factor_BLT=room(num_tiles, dtype=torch.float64).fill_(torch.nan),
        mass_BLT=room(num_tiles, dtype=torch.float64),
        edge_BL=room(dtype=torch.int64 if is_wide else torch.int32),
        last_BL=room(dtype=torch.int32),
        fault_BL=room(dtype=torch.int32).zero_(),
    )
