"""The second stage of attention over pages: new rows over new keys, and the chunks of the prefix merged.

A tile holds rows of one segment, the clean rows or one block. A segment's keys are the clean rows that it
sees, tile by tile, and those of the block itself; keys of other blocks are never read.

Shapes: B requests, R rows of each, H query heads, G key heads, C chunks, D head width; N rows in all; a tile
has M rows of one key head, r * (H / G) + h, and N keys.
"""

import triton
import triton.language as tl

from blockroll.kernels.block_attention.fused_softmax import added, chunk_size, scores

UNSPECIALIZED = (
    "rows_step", "request_step", "num_rows", "num_clean", "width", "num_key_heads", "repeats",
    "clean_tiles", "block_tiles", "num_tiles", "least_chunk", "window",
)  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def tail_stage(
    QUERY, KEY, VALUE, LENGTHS, STARTS, COUNTS, OFFSETS, PART, LOGMASS, OUT,
    query_b, query_h, query_r, key_b, key_g, key_r, value_b, value_g, value_r,
    rows_step, request_step, num_rows, num_clean, width, num_key_heads, repeats,
    clean_tiles, block_tiles, num_tiles, least_chunk, window, scale, cap,
    D: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, AT_ONCE: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The attention of every row (N, H, D), in the type of the output."""
    tile = tl.program_id(0) % num_tiles
    head = tl.program_id(0) // num_tiles % num_key_heads
    request = tl.program_id(0) // num_tiles // num_key_heads
    length = tl.load(LENGTHS + request).to(tl.int32)
    count = tl.minimum(tl.load(COUNTS + request * request_step).to(tl.int32), num_clean)

    is_block = tile >= clean_tiles
    block = (tile - clean_tiles) // block_tiles
    segment_first = tl.where(is_block, num_clean + block * width, 0)
    segment_rows = tl.where(is_block, width, count)
    first_place = tl.where(is_block, (tile - clean_tiles) % block_tiles, tile) * TILE_M
    if first_place >= segment_rows * repeats:
        return

    place_M = first_place + tl.arange(0, TILE_M)
    is_row_M = place_M < segment_rows * repeats
    place_M = tl.minimum(place_M, segment_rows * repeats - 1)  # what is no row is the last one once more
    own_row_M = place_M // repeats
    row_M = segment_first + own_row_M
    query_head_M = head * repeats + place_M % repeats
    start = tl.load(STARTS + request * request_step)
    offset_D = tl.arange(0, D)
    at_M = request.to(tl.int64) * query_b + (start + row_M) * query_r + query_head_M.to(tl.int64) * query_h
    q = tl.load(QUERY + at_M[:, None] + offset_D[None, :])
    if WIDE:
        q = q.to(tl.float32)

    # Clean rows that the tile sees, and of a block what its first row stands behind.
    num_behind = tl.load(OFFSETS + segment_first).to(tl.int32)
    num_seen = tl.where(is_block, num_behind, tl.max(own_row_M, 0) + 1)
    last_seen_M = tl.where(is_block, num_clean + width, own_row_M)
    first_seen = tl.maximum(-length, 0)  # rows before a text's first token are nobody's
    row_offset_M = own_row_M + tl.where(is_block, num_behind, 0)
    if WINDOWED:
        first_seen = tl.maximum(first_seen, tl.min(row_offset_M, 0) - window + 1)
    first_tile = first_seen // TILE_N
    own_tile = tl.where(first_seen < num_seen, (num_seen + TILE_N - 1) // TILE_N, first_tile)
    num_key_tiles = own_tile + tl.where(is_block, (width + TILE_N - 1) // TILE_N, 0)

    top_M = tl.full([TILE_M], -1e30, tl.float32)
    mass_M = tl.zeros([TILE_M], tl.float32)
    out_MD = tl.zeros([TILE_M, D], tl.float32)
    chunk_rows = chunk_size(length, least_chunk)
    first_chunk = 0
    if WINDOWED:
        first_seen_M = length + row_offset_M - window + 1
        first_chunk = tl.maximum(tl.min(first_seen_M, 0), 0) // chunk_rows
    num_chunks = (tl.maximum(length, 0) + chunk_rows - 1) // chunk_rows
    heads = num_key_heads * repeats
    to_M = (request.to(tl.int64) * rows_step + start + row_M) * heads + query_head_M
    for chunk in range(first_chunk, num_chunks, AT_ONCE):
        for more in tl.static_range(AT_ONCE):
            read = tl.minimum(chunk + more, num_chunks - 1)
            at = to_M + read.to(tl.int64) * num_rows * heads
            part_MD = tl.load(PART + at[:, None] * D + offset_D[None, :])
            part_top_M = tl.load(LOGMASS + at)
            part_top_M = tl.where(chunk + more < num_chunks, part_top_M, float("-inf"))
            if WINDOWED:  # what a row does not see of a chunk may not have been written
                is_seen_M = tl.minimum((read + 1) * chunk_rows, length) > first_seen_M
                part_MD = tl.where(is_seen_M[:, None], part_MD, 0.0)
                part_top_M = tl.where(is_seen_M, part_top_M, float("-inf"))
            new_top_M = tl.maximum(top_M, part_top_M)
            kept_M = tl.exp2(top_M - new_top_M)
            part_M = tl.exp2(part_top_M - new_top_M)
            out_MD = out_MD * kept_M[:, None] + part_MD * part_M[:, None]
            mass_M = mass_M * kept_M + part_M
            top_M = new_top_M

    KEY += request.to(tl.int64) * key_b + head.to(tl.int64) * key_g
    VALUE += request.to(tl.int64) * value_b + head.to(tl.int64) * value_g
    for key_tile in range(first_tile, num_key_tiles):
        is_own = key_tile >= own_tile
        key_N = tl.where(is_own, key_tile - own_tile, key_tile) * TILE_N + tl.arange(0, TILE_N)
        least_key, last_key = tl.where(is_own, 0, first_seen), tl.where(is_own, width, num_seen) - 1
        # Nothing but the keys of the segment is read: others may be NaN.
        read_N = tl.minimum(tl.maximum(key_N, least_key), last_key)
        at_N = start + read_N + tl.where(is_own, segment_first, 0)
        k = tl.load(KEY + (at_N * key_r)[:, None] + offset_D[None, :])
        v = tl.load(VALUE + (at_N * value_r)[:, None] + offset_D[None, :])
        if WIDE:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        s = scores(q, k, scale, cap, CAPPED)
        is_seen = (key_N >= least_key)[None, :] & (
            key_N[None, :] <= tl.minimum(last_seen_M, last_key)[:, None]
        )
        if WINDOWED:
            first_seen_M = row_offset_M - tl.where(is_own, num_behind, 0) - window + 1
            is_seen = is_seen & (key_N[None, :] >= first_seen_M[:, None])
        s = tl.where(is_seen, s, float("-inf"))
        top_M, mass_M, out_MD = added(s, v, top_M, mass_M, out_MD, KEY.dtype.element_ty, WIDE)

    mass_M = tl.where(mass_M == 0.0, 1.0, mass_M)  # nobody's rows see nothing
    out_MD = (out_MD * (1.0 / mass_M)[:, None]).to(OUT.dtype.element_ty)
    tl.store(OUT + to_M[:, None] * D + offset_D[None, :], out_MD, mask=is_row_M[:, None])
