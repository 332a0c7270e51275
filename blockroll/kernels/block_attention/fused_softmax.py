"""What both stages of attention over pages do alike: where chunks end, scores, and a running softmax.

Scores are in base 2: 2 ** s is what exp of the usual score is.

Shapes: M rows of a tile, N keys of a tile, D head width.
"""

import triton
import triton.language as tl

LEAST_CHUNK, MOST_CHUNK = 256, 4096  # keys
CHUNKS = 32  # that a prefix is split into, where neither bound says otherwise

_LEAST = tl.constexpr(LEAST_CHUNK)
_CHUNKS = tl.constexpr(CHUNKS)
_DOUBLINGS = tl.constexpr((MOST_CHUNK // LEAST_CHUNK).bit_length() - 1)


def most_chunks(extent: int, least: int) -> int:
    """Chunks that no prefix of up to `extent` rows has more of."""
    by_least = -(-extent // max(least, LEAST_CHUNK))
    return min(by_least, max(CHUNKS, -(-extent // MOST_CHUNK)))


@triton.jit
def chunk_size(length, least):
    """Of a request's own length alone, so that nothing beside it in a batch changes how keys are summed."""
    size = length * 0 + _LEAST
    for _ in tl.static_range(_DOUBLINGS):
        size = tl.where(length > size * _CHUNKS, size * 2, size)
    return tl.maximum(size, least)


@triton.jit
def scores(q, k, scale, cap, CAPPED: tl.constexpr):
    """(M, N) of queries (M, D) and keys (N, D): scale * q @ k, or cap * tanh of that."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if CAPPED:
        root = tl.rsqrt(tl.exp2(s * 2.8853900817779268) + 1.0)  # 2 / ln 2; a quotient takes far longer
        s = cap - 2.0 * cap * root * root
    return s


@triton.jit
def added(s, v, top, mass, out, ROUNDED: tl.constexpr, WIDE: tl.constexpr):
    """The running softmax with one more tile of keys: its greatest score, its mass, and its sum of values.

    Weights are rounded to the type of values. `WIDE` multiplies in float32: the interpreter has no bfloat16.
    """
    new_top = tl.maximum(top, tl.max(s, 1))
    weights = tl.exp2(s - new_top[:, None])
    kept = tl.exp2(top - new_top)
    mass = mass * kept + tl.sum(weights, 1)
    rounded = weights.to(ROUNDED)
    if WIDE:
        rounded = rounded.to(tl.float32)
    out = tl.dot(rounded, v, out * kept[:, None], input_precision="ieee")
    return new_top, mass, out
