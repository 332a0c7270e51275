"""`block_attention` in Triton: a stage over chunks of the prefix, and one over new rows, which merges them.

The host decides from shapes alone: nothing on the device is read, so a graph can hold a call.

Shapes: B requests, H query heads, G key heads, R rows, D head width, C chunks; N rows where they are packed.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from blockroll.kernels.block_attention.fused_prefix import prefix_stage
from blockroll.kernels.block_attention.fused_softmax import LEAST_CHUNK, most_chunks
from blockroll.kernels.block_attention.fused_tail import tail_stage
from blockroll.kernels.block_attention.layout import RowLayout
from blockroll.kernels.block_attention.packing import Packing
from blockroll.kernels.builds import Build
from blockroll.kernels.pages import Pages
from blockroll.kernels.transfer import sent

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Tile:
    """How a stage is cut for one program: rows of one key head, keys at a time, warps, and loads ahead."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    chunks_at_once: int = 1  # of the tail: partial results that are read together


@dataclass(frozen=True, slots=True)
class Tiles:
    """Of both stages, for up to so many rows."""

    prefix: Tile
    tail: Tile


# By head width, from few rows to many. These compile without spills for gfx942, gfx950 and sm_90.
_HALF: dict[int, tuple[Tiles, ...]] = {
    32: (Tiles(Tile(64, 32, 4, 2), Tile(64, 16, 4, 1, 4)),),
    64: (
        Tiles(Tile(16, 64, 4, 2), Tile(16, 16, 4, 1, 8)),
        Tiles(Tile(64, 32, 4, 2), Tile(64, 16, 4, 1, 2)),
        Tiles(Tile(128, 32, 8, 2), Tile(128, 32, 8, 1)),
    ),
    128: (
        Tiles(Tile(16, 64, 4, 2), Tile(16, 16, 4, 1, 8)),
        Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 8, 1, 2)),
        Tiles(Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
    ),
    256: (
        Tiles(Tile(16, 32, 4, 2), Tile(16, 16, 4, 1, 4)),
        Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    ),
}
_SINGLE: dict[int, tuple[Tiles, ...]] = {
    32: (Tiles(Tile(64, 32, 4, 1), Tile(64, 16, 8, 2)),),
    64: (Tiles(Tile(64, 32, 8, 2), Tile(64, 16, 8, 2)),),
    128: (Tiles(Tile(64, 16, 8, 2), Tile(64, 16, 8, 2)),),
    256: (Tiles(Tile(32, 16, 8, 1), Tile(32, 16, 8, 2)),),
}
_TYPES = {torch.bfloat16: ("bf16", _HALF), torch.float16: ("fp16", _HALF), torch.float32: ("fp32", _SINGLE)}
_NO_WINDOW = 1 << 30
# A chunk has so many for each row: what partial results take is then a quarter of what keys do, or less.
_KEYS_OF_A_ROW = 8
_OF_PACKED = 64  # rows of a request, whatever its own are: others' numbers must not decide


def config(dtype: torch.dtype, width: int, rows: int) -> Tiles:
    """For heads of this width and so many rows of a request and key head."""
    _, tables = _TYPES[dtype]
    choices = tables[width]
    return next((tiles for tiles in choices if tiles.prefix.rows >= rows), choices[-1])


def block_attention(
    query_BHRD: Tensor,
    key_BGRD: Tensor,
    value_BGRD: Tensor,
    pages: Pages,
    layout: RowLayout,
    lengths_B: Tensor,
    packing: Packing | None,
    scaling: float | None,
    softcap: float | None,
    sliding_window: int | None,
) -> Tensor:
    """As the operation says, (B, R, H, D); multiplied in the type of the pages, summed in float32."""
    dtype, device = pages.keys_NGZD.dtype, query_BHRD.device
    query, key, value = (_operand(each, dtype) for each in (query_BHRD, key_BGRD, value_BGRD))
    size, num_heads, rows, width = query.shape
    out_BRHD = torch.empty((size, rows, num_heads, width), dtype=dtype, device=device)
    if not out_BRHD.numel():
        return out_BRHD.to(query_BHRD.dtype)
    key_heads, repeats = key.shape[1], num_heads // key.shape[1]
    starts, counts = _all_rows(rows, device) if packing is None else (packing.starts_B, packing.num_rows_B)
    num_tiled = rows * repeats if packing is None else _OF_PACKED
    tiles = config(dtype, width, num_tiled)
    least_chunk = max(LEAST_CHUNK, triton.next_power_of_2(num_tiled * _KEYS_OF_A_ROW))
    num_chunks = most_chunks(pages.table_BT.shape[1] * pages.size, least_chunk)
    part_CNHD = torch.empty((num_chunks, size * rows, num_heads, width), dtype=torch.float32, device=device)
    scale = width**-0.5 if scaling is None else scaling
    shared: dict[str, Any] = {
        "QUERY": query,
        "LENGTHS": lengths_B,
        "STARTS": starts,
        "COUNTS": counts,
        "OFFSETS": layout.offsets(device),
        "PART": part_CNHD,
        "LOGMASS": torch.empty(part_CNHD.shape[:3], dtype=torch.float32, device=device),
        **_strides("query", query, packing),
        "rows_step": rows if packing is None else 0,
        "request_step": 0 if packing is None else 1,
        "num_rows": size * rows,
        "num_key_heads": key_heads,
        "repeats": repeats,
        "least_chunk": least_chunk,
        "window": _NO_WINDOW if sliding_window is None else sliding_window,
        "scale": scale * _LOG2_E if softcap is None else scale / softcap,
        "cap": 0.0 if softcap is None else softcap * _LOG2_E,
        "D": width,
        "CAPPED": softcap is not None,
        "WINDOWED": sliding_window is not None or softcap is not None,  # one form less to compile
        "WIDE": triton.knobs.runtime.interpret,
    }
    num_clean = layout.num_clean if packing is None else packing.width
    if num_chunks:
        most = layout.num_rows if packing is None else packing.width
        _run_prefix(shared, pages, tiles.prefix, triton.cdiv(most * repeats, tiles.prefix.rows))
    new = {"KEY": key, "VALUE": value, **_strides("key", key, packing), **_strides("value", value, packing)}
    _run_tail(shared | new, out_BRHD, tiles.tail, layout, num_clean, len(lengths_B))
    return out_BRHD.to(query_BHRD.dtype)


def _run_prefix(shared: dict[str, Any], pages: Pages, tile: Tile, num_tiles: int) -> None:
    num_chunks, num_requests = len(shared["PART"]), len(shared["LENGTHS"])
    page_n, page_g, page_z, _ = pages.keys_NGZD.stride()
    prefix_stage[(num_requests * pages.num_heads * num_chunks * num_tiles,)](
        **shared,
        KEYS=pages.keys_NGZD,
        VALUES=pages.values_NGZD,
        TABLE=pages.table_BT,
        page_n=page_n,
        page_g=page_g,
        page_z=page_z,
        table_width=pages.table_BT.stride(0),
        page_shift=pages.size.bit_length() - 1,
        num_tiles=num_tiles,
        num_chunks=num_chunks,
        num_dies=_dies(pages.keys_NGZD.device),
        TILE_M=tile.rows,
        TILE_N=tile.keys,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _run_tail(
    shared: dict[str, Any], out: Tensor, tile: Tile, layout: RowLayout, num_clean: int, num_requests: int
) -> None:
    repeats = shared["repeats"]
    clean_tiles, block_tiles = (triton.cdiv(each * repeats, tile.rows) for each in (num_clean, layout.width))
    num_tiles = clean_tiles + block_tiles * len(layout.levels)
    tail_stage[(num_requests * shared["num_key_heads"] * num_tiles,)](
        **shared,
        OUT=out,
        num_clean=num_clean,
        width=layout.width,
        clean_tiles=clean_tiles,
        block_tiles=max(block_tiles, 1),
        num_tiles=num_tiles,
        TILE_M=tile.rows,
        TILE_N=tile.keys,
        AT_ONCE=tile.chunks_at_once,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In this type, and as kernels are compiled for: rows are contiguous and begin at multiples of 16."""
    tensor = tensor.to(dtype)
    *outer, inner = tensor.stride()
    is_aligned = inner == 1 and not any(each % 16 for each in outer) and tensor.data_ptr() % 16 == 0
    return tensor if is_aligned else tensor.contiguous()


def _strides(name: str, tensor_BHRD: Tensor, packing: Packing | None) -> dict[str, int]:
    """Packed rows of all requests lie in one row of the batch, where each request has its start."""
    of_request, of_head, of_row, _ = tensor_BHRD.stride()
    letter = "h" if name == "query" else "g"
    return {
        f"{name}_b": of_request if packing is None else 0,
        f"{name}_{letter}": of_head,
        f"{name}_r": of_row,
    }


@lru_cache(maxsize=256)
def _all_rows(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First row and number of rows, int64, alike for all requests of a rectangle."""
    first, count = sent([[0], [rows]], device)
    return first, count


@lru_cache(maxsize=16)
def _dies(device: torch.device) -> int:
    """That share no cache and are dealt programs in turn: XCDs of 32 or 38 compute units, on AMD's."""
    if device.type != "cuda" or torch.version.hip is None:
        return 1
    properties = torch.cuda.get_device_properties(device)
    units = {"gfx942": 38, "gfx950": 32}.get(properties.gcnArchName.split(":")[0])
    return 1 if units is None else max(1, properties.multi_processor_count // units)


def builds() -> Iterator[Build]:
    """Both stages for all types, widths and tiles: plain, with a window, and with a soft cap besides.

    Float16 takes what bfloat16 takes: it is compiled with all that may be asked alone.
    """
    for name, tables in _TYPES.values():
        for width, choices in tables.items():
            for tiles in choices:
                for windowed, capped in ((False, False), (True, False), (True, True)):
                    if name != "fp16" or capped:
                        yield _build(prefix_stage, name, width, tiles.prefix, capped, windowed)
                        yield _build(tail_stage, name, width, tiles.tail, capped, windowed)


def _build(kernel: Any, name: str, width: int, tile: Tile, capped: bool, windowed: bool) -> Build:
    constants = {
        "D": width,
        "TILE_M": tile.rows,
        "TILE_N": tile.keys,
        "CAPPED": capped,
        "WINDOWED": windowed,
        "WIDE": False,
    }
    if kernel is tail_stage:
        constants["AT_ONCE"] = tile.chunks_at_once
    tensors = {"TABLE": "*i64", "LENGTHS": "*i64", "STARTS": "*i64", "COUNTS": "*i64", "OFFSETS": "*i64"}
    tensors |= {"PART": "*fp32", "LOGMASS": "*fp32"}
    floats = {"scale": "fp32", "cap": "fp32"}
    types = {
        each: "constexpr"
        if each in constants
        else floats.get(each, "i32" if each.islower() else tensors.get(each, f"*{name}"))
        for each in kernel.arg_names
    }
    is_stride = re.compile("(query|key|value|page)_[a-z]").fullmatch
    stage = "prefix" if kernel is prefix_stage else "tail"
    asked = " capped" * capped + " windowed" * windowed
    return Build(
        label=f"{stage} {name} width {width} tile {tile.rows}x{tile.keys}{asked}",
        kernel=kernel,
        types=types,
        constants=constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        aligned=frozenset(each for each in types if types[each].startswith("*") or is_stride(each)),
    )
