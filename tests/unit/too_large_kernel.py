"""A kernel whose tile no GPU's registers hold."""

import triton
import triton.language as tl

from blockroll.kernels.builds import Build


@triton.jit
def squared(x, out, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)
    places = rows[:, None] * SIZE + rows[None, :]
    tile = tl.load(x + places)
    tl.store(out + places, tl.dot(tile, tile))


def build(size: int) -> Build:
    """Of tiles of so many rows and columns."""
    return Build(
        label=f"squared {size}",
        kernel=squared,
        types={"x": "*bf16", "out": "*fp32", "SIZE": "constexpr"},
        constants={"SIZE": size},
        num_warps=8,
        aligned=frozenset({"x", "out"}),
    )
