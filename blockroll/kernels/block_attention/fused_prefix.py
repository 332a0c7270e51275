"""The first stage of attention over pages: all rows of a request over one chunk of its prefix.

The rows of all query heads of one key head are one tile, so a page is read once for all of them. Of each
chunk and row stay the softmax over its keys and the logarithm of its mass: partial results, which the tail
merges.

Shapes: B requests, R rows of each, H query heads, G key heads, C chunks, D head width; N rows in all; a tile
has M rows of one key head, r * (H / G) + h, and N keys.
"""

import triton
import triton.language as tl

from blockroll.kernels.block_attention.fused_softmax import added, chunk_size, scores

# Integers that change from call to call: a kernel is not compiled anew for them.
UNSPECIALIZED = (
    "rows_step", "request_step", "table_width", "page_shift", "num_rows", "num_key_heads", "repeats",
    "num_tiles", "num_chunks", "least_chunk", "window", "num_dies",
)  # fmt: skip


@triton.jit
def placed(pid, num_groups, num_tiles, num_dies):
    """Group and tile of a program. Tiles of one group read the same keys: they run on one die, by its cache.

    Dies are dealt programs in turn, and each takes the next group. Any number of groups is permuted.
    """
    whole = num_groups // num_dies * num_dies
    die, turn = pid % num_dies, pid // num_dies
    is_dealt = pid < whole * num_tiles
    rest = pid - whole * num_tiles
    group = tl.where(is_dealt, turn // num_tiles * num_dies + die, whole + rest // num_tiles)
    tile = tl.where(is_dealt, turn % num_tiles, rest % num_tiles)
    return group, tile


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prefix_stage(
    QUERY, KEYS, VALUES, TABLE, LENGTHS, STARTS, COUNTS, OFFSETS, PART, LOGMASS,
    query_b, query_h, query_r, page_n, page_g, page_z,
    rows_step, request_step, table_width, page_shift, num_rows, num_key_heads, repeats, num_tiles, num_chunks,
    least_chunk, window, num_dies, scale, cap,
    D: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Partial results (C, N, H, D) and the base-2 logarithms of their masses (C, N, H), float32."""
    group, tile = placed(tl.program_id(0), tl.num_programs(0) // num_tiles, num_tiles, num_dies)
    head = group % num_key_heads
    chunk = group // num_key_heads % num_chunks
    request = group // num_key_heads // num_chunks

    length = tl.load(LENGTHS + request).to(tl.int32)
    count = tl.load(COUNTS + request * request_step).to(tl.int32)
    chunk_rows = chunk_size(length, least_chunk)
    first_key = chunk * chunk_rows
    stop = tl.minimum(first_key + chunk_rows, length)
    if (first_key >= length) | (tile * TILE_M >= count * repeats):
        return

    place_M = tile * TILE_M + tl.arange(0, TILE_M)
    is_row_M = place_M < count * repeats
    place_M = tl.minimum(place_M, count * repeats - 1)  # what is no row is the last one once more
    row_M = place_M // repeats
    query_head_M = head * repeats + place_M % repeats
    if WINDOWED:
        first_seen_M = length + tl.load(OFFSETS + row_M).to(tl.int32) - window + 1
        first_key = tl.maximum(first_key, tl.min(first_seen_M, 0))
        if first_key >= stop:
            return

    start = tl.load(STARTS + request * request_step)
    offset_D = tl.arange(0, D)
    at_M = request.to(tl.int64) * query_b + (start + row_M) * query_r + query_head_M.to(tl.int64) * query_h
    q = tl.load(QUERY + at_M[:, None] + offset_D[None, :])
    if WIDE:
        q = q.to(tl.float32)

    top_M = tl.full([TILE_M], -1e30, tl.float32)
    mass_M = tl.zeros([TILE_M], tl.float32)
    out_MD = tl.zeros([TILE_M, D], tl.float32)
    TABLE += request.to(tl.int64) * table_width
    KEYS += head.to(tl.int64) * page_g
    VALUES += head.to(tl.int64) * page_g
    last_row = (1 << page_shift) - 1
    for tile_key in range(first_key // TILE_N * TILE_N, stop, TILE_N):
        key_N = tile_key + tl.arange(0, TILE_N)
        # Nothing but the keys of the chunk is read: behind it, and before the window, lies what may be NaN.
        read_N = tl.minimum(tl.maximum(key_N, first_key), stop - 1)
        page_N = tl.load(TABLE + (read_N >> page_shift))
        from_ND = (page_N * page_n + (read_N & last_row) * page_z)[:, None] + offset_D[None, :]
        k = tl.load(KEYS + from_ND)
        v = tl.load(VALUES + from_ND)
        if WIDE:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        s = scores(q, k, scale, cap, CAPPED)
        s += tl.where(key_N < stop, 0.0, float("-inf"))[None, :]  # what is read is finite
        if WINDOWED:
            s = tl.where(key_N[None, :] >= first_seen_M[:, None], s, float("-inf"))
        top_M, mass_M, out_MD = added(s, v, top_M, mass_M, out_MD, KEYS.dtype.element_ty, WIDE)

    # A row whose window begins behind the chunk has no mass: the tail does not read it.
    mass_M = tl.where(mass_M == 0.0, 1.0, mass_M)
    out_MD = out_MD * (1.0 / mass_M)[:, None]
    heads = num_key_heads * repeats
    first_row = request.to(tl.int64) * rows_step + start
    to_M = (chunk.to(tl.int64) * num_rows + first_row + row_M) * heads + query_head_M
    tl.store(LOGMASS + to_M, top_M + tl.log2(mass_M), mask=is_row_M)
    tl.store(PART + to_M[:, None] * D + offset_D[None, :], out_MD, mask=is_row_M[:, None])
