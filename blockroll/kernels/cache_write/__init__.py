"""New keys and values of a forward: rows of tokens to the pages of their texts, masks to scratch.

Shapes: B requests, G key heads, R new rows, C of them written to pages, M masks behind those, D head width; T
pages of the longest request.
"""

import torch
from torch import Tensor

from blockroll.errors import InvalidInput
from blockroll.kernels.cache_write import reference
from blockroll.kernels.cache_write.reference import Places
from blockroll.kernels.choice import is_triton
from blockroll.kernels.pages import Pages

__all__ = ["Places", "cache_write", "places_of"]


def places_of(
    table_BT: Tensor,
    page_size: int,
    index_BC: Tensor,
    *,
    request_BC: Tensor | None = None,
    has_gaps: bool = False,
) -> Places:
    """Where rows go, once for all layers: `index_BC` says which row of its text each new row is.

    Rows of batch row b are request b's, or those of `request_BC`. With `has_gaps` a row of an index
    below 0, or of a page 0 in the table, is nobody's.
    """
    if index_BC.dtype != torch.int64 or index_BC.dim() != 2:
        raise InvalidInput(
            f"indices are {index_BC.dtype} {tuple(index_BC.shape)}: give int64 (B, C), rows of texts"
        )
    if request_BC is None and len(index_BC) != len(table_BT):
        raise InvalidInput(
            f"there are rows of {len(index_BC)} requests, and the table of pages has {len(table_BT)}: give "
            "both of the same requests, or say whose each row is (request_BC)"
        )
    if request_BC is not None and request_BC.shape != index_BC.shape:
        raise InvalidInput(
            f"requests have shape {tuple(request_BC.shape)} and indices {tuple(index_BC.shape)}: give one of "
            "each for every row"
        )
    return reference.places_of(table_BT, page_size, index_BC, request_BC, has_gaps)


def cache_write(
    key_BGRD: Tensor,
    value_BGRD: Tensor,
    pages: Pages,
    places: Places,
    *,
    scratch: tuple[Tensor, Tensor] | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write the first C rows to their places, in the type of the pages, and nothing else there.

    Of rows that are nobody's zeros are written to page 0. Rows behind the first C are masks: they go to
    `scratch`, keys and values (B, G, M, D) that no text owns, and are never committed. No two rows of texts
    may have one place. With `rotary`, cosines and sines (B, R, D) of the positions of all rows in the type of
    the keys, as transformers' Llama and Qwen make them, keys come as they were projected: they are turned in
    place, for attention reads them next, and written so. InvalidInput where shapes do not belong together.
    """
    size, heads, rows, width = key_BGRD.shape
    num_placed = places.page_BC.shape[1]
    held = (pages.num_heads, pages.keys_NGZD.shape[3])
    if key_BGRD.shape != value_BGRD.shape or (heads, width) != held or len(places.page_BC) != size:
        raise InvalidInput(
            f"new keys have shape {tuple(key_BGRD.shape)}, values {tuple(value_BGRD.shape)}, pages "
            f"{held[0]} heads of width {held[1]}, and places are of {len(places.page_BC)} requests: give "
            "(B, G, R, D) of as many heads, width and requests"
        )
    num_spare = 0 if scratch is None else scratch[0].shape[2]
    if num_placed + num_spare != rows:
        raise InvalidInput(
            f"there are {rows} new rows, places for {num_placed} and scratch for {num_spare}: give room "
            "for all"
        )
    if rotary is not None:
        _check_rotary(key_BGRD, rotary)
    if scratch is not None and any(each.dtype != pages.keys_NGZD.dtype for each in scratch):
        raise InvalidInput(
            f"scratch is {scratch[0].dtype} and {scratch[1].dtype}: give both as the pages, "
            f"{pages.keys_NGZD.dtype}"
        )
    if is_triton():
        pages.check_served()
        from blockroll.kernels.cache_write import fused

        fused.write(key_BGRD, value_BGRD, pages, places, scratch, rotary)
    else:
        reference.write(key_BGRD, value_BGRD, pages, places, scratch, rotary)


def _check_rotary(key_BGRD: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
    size, _, rows, width = key_BGRD.shape
    for name, each in zip(("cosines", "sines"), rotary, strict=True):
        if each.shape != (size, rows, width) or each.dtype != key_BGRD.dtype:
            raise InvalidInput(
                f"{name} are {each.dtype} {tuple(each.shape)}, and keys {key_BGRD.dtype} "
                f"{tuple(key_BGRD.shape)}: give (B, R, D) of the same rows in the type of the keys"
            )
