"""Attention of the new rows of a forward: a cached prefix, and a tail of clean rows and blocks of masks.

What a row sees follows from a few integers (`RowLayout`): no mask of rows and keys is given to a kernel. On a
CPU one is made, once for all layers of a kind.

Shapes: B requests, H query heads, G key heads, R new rows, S keys, D head width.
"""

from torch import Tensor

from blockroll.errors import InvalidInput
from blockroll.kernels.block_attention import reference
from blockroll.kernels.block_attention.layout import RowLayout
from blockroll.kernels.block_attention.packing import Packing
from blockroll.kernels.block_attention.rows import AttendedRows, BlockRows
from blockroll.kernels.choice import is_triton
from blockroll.kernels.pages import Pages

__all__ = [
    "AttendedRows",
    "BlockRows",
    "Packing",
    "RowLayout",
    "block_attention",
    "masked_attention",
    "window_attention",
]

masked_attention = reference.masked_attention


def block_attention(
    query_BHRD: Tensor,
    key_BGRD: Tensor,
    value_BGRD: Tensor,
    pages: Pages,
    layout: RowLayout,
    lengths_B: Tensor,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Softmax attention (B, R, H, D) over a prefix in pages, `lengths_B` rows of each request, and new rows.

    `scaling` of scores is D ** -0.5 if None; `softcap` c bends them to c * tanh(score / c). With a sliding
    window w a row sees the keys less than w positions before it, and itself. Keys and values behind a prefix,
    and those of blocks for rows outside of them, may hold anything, NaN too; those of clean rows must be
    finite. With a `packing` of rows without masks, queries, keys and values (1, H, N, D) come, (1, N, H, D)
    goes back, and the layout is that of the rectangle. InvalidInput where shapes, types or the layout do not
    belong together.
    """
    _check_heads(query_BHRD, key_BGRD, value_BGRD)
    size, _, rows, width = query_BHRD.shape
    if packing is not None:
        _check_packing(query_BHRD, layout, packing)
        size, rows = len(packing.num_rows), layout.num_rows
    elif key_BGRD.shape[2] != rows or layout.num_rows != rows:
        raise InvalidInput(
            f"there are {rows} queries and {key_BGRD.shape[2]} keys of each request, and the layout has "
            f"{layout.num_rows} rows: give all three alike"
        )
    held = (len(pages.table_BT), pages.num_heads, pages.keys_NGZD.shape[3])
    if held != (size, key_BGRD.shape[1], width) or lengths_B.shape != (size,):
        raise InvalidInput(
            f"pages are of {held[0]} requests, {held[1]} heads and width {held[2]}, lengths of "
            f"{tuple(lengths_B.shape)}, and new keys of {(size, key_BGRD.shape[1], width)}: give all alike"
        )
    _check_window(sliding_window)
    given = (query_BHRD, key_BGRD, value_BGRD, pages, layout, lengths_B)
    options = (scaling, softcap, sliding_window)
    if is_triton():
        pages.check_served()
        from blockroll.kernels.block_attention import fused

        return fused.block_attention(*given, packing, *options)
    if packing is not None:
        return reference.packed_attention(*given, packing, *options)
    return reference.paged_attention(*given, *options)


def window_attention(
    query_BHRD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    rows: AttendedRows,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The same (B, R, H, D) over keys and values as a window of the cache has them, the new rows among them.

    Of packed rows, (1, H, N, D), it is (1, N, H, D). All keys and values must be finite: a row multiplies
    those that it does not see with zero.
    """
    if rows.packing is not None:
        given = (query_BHRD, key_BGSD, value_BGSD, rows, sliding_window)
        return reference.banded_attention(*given, scaling, softcap, dropout)
    _check_heads(query_BHRD, key_BGSD, value_BGSD)
    repeats = query_BHRD.shape[1] // key_BGSD.shape[1]
    mask = rows.mask(sliding_window) if softcap is not None else rows.folded_mask(sliding_window, repeats)
    return reference.masked_attention(
        query_BHRD, key_BGSD, value_BGSD, mask, scaling=scaling, softcap=softcap, dropout=dropout
    )


def _check_heads(query_BHRD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor) -> None:
    """Asked in every layer: a few comparisons."""
    size, heads, _, width = query_BHRD.shape
    key_size, key_heads, _, key_width = key_BGSD.shape
    if size != key_size or heads % key_heads or width != key_width or key_BGSD.shape != value_BGSD.shape:
        raise InvalidInput(
            f"queries have shape {tuple(query_BHRD.shape)}, keys {tuple(key_BGSD.shape)} and values "
            f"{tuple(value_BGSD.shape)}: give (B, H, R, D) and (B, G, S, D), with H a multiple of G"
        )


def _check_packing(query_1HND: Tensor, layout: RowLayout, packing: Packing) -> None:
    num_rows, most = len(packing.request_N), max(packing.num_rows)
    if layout.num_masks or layout.num_rows < most or query_1HND.shape[2] != num_rows:
        raise InvalidInput(
            f"{query_1HND.shape[2]} packed rows came, of a packing of {num_rows} with {most} of one "
            f"request, in a layout of {layout.num_clean} clean rows and {layout.num_masks} masks: give the "
            "rows of the packing, and a layout without masks that is as wide"
        )


def _check_window(sliding_window: int | None) -> None:
    if sliding_window is not None and sliding_window < 1:
        raise InvalidInput(f"the sliding window is {sliding_window}: give 1 position or more, or None")
