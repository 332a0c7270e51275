"""What kernels of rows share: how a tile of logits is read, weighed and cut, and how a uniform is drawn.

Float32 is what logits are read as, and what weights are computed in; float64 where they are float64. The
interpreter computes bfloat16 wrongly, so it is widened by the load.

Shapes: N rows of a program, W ids of a tile.
"""

import triton
import triton.language as tl


@triton.jit
def logits_of(X, at_N, ids_NW, is_on_NW):
    """Logits of ids of rows that begin there; -infinity where a cell is off."""
    x_NW = tl.load(X + at_N[:, None] + ids_NW, mask=is_on_NW, other=float("-inf"))
    if X.dtype.element_ty == tl.float64:
        return x_NW
    else:
        return x_NW.to(tl.float32)


@triton.jit
def scale_of(TEMPERATURE, request_N, dtype: tl.constexpr):
    """What gaps are multiplied by, finite also where a temperature is next to nothing; 1 where it is 0."""
    temperature_N = tl.load(TEMPERATURE + request_N).to(tl.float64)
    warm_N = tl.minimum(tl.maximum(temperature_N, 1.1754943508222875e-38), 1e30)
    return tl.where(temperature_N == 0, 1.0, 1.0 / warm_N).to(dtype)


@triton.jit
def key_of(gap):
    """Bits of a gap: as numbers that are not negative ascend, so do their bits."""
    if gap.dtype == tl.float64:
        return gap.to(tl.int64, bitcast=True)
    else:
        return gap.to(tl.int32, bitcast=True)


@triton.jit
def gap_of(key):
    """The gap that has these bits."""
    if key.dtype == tl.int64:
        return key.to(tl.float64, bitcast=True)
    else:
        return key.to(tl.float32, bitcast=True)


@triton.jit
def whole_key(shape: tl.constexpr, dtype: tl.constexpr):
    """Above the key of every gap, infinity's too: the edge of a row that is not cut."""
    if dtype == tl.int64:
        return tl.full(shape, 0x7FFFFFFFFFFFFFFF, dtype)
    else:
        return tl.full(shape, 0x7FFFFFFF, dtype)


@triton.jit
def prob_of(y, ids, is_on, top, factor, edge, last, scale, is_dense):
    """Probabilities, float64, of ids whose logits these are, by what is known of rows that were read."""
    gap = top - y
    w = tl.exp(-(gap * scale))
    if y.dtype == tl.float64:
        w = tl.where(is_dense != 0, y, w)
    w = tl.where(top == float("inf"), 1.0, w)
    key = key_of(gap)
    stays = (key < edge) | ((key == edge) & (ids <= last))
    return tl.where(is_on & stays, w, 0.0).to(tl.float64) * factor


@triton.jit
def probs_of(y_NW, ids_NW, is_on_NW, top_N, factor_N, edge_N, last_N, scale_N, is_dense):
    """The same, of a tile of each row."""
    return prob_of(
        y_NW, ids_NW, is_on_NW, top_N[:, None], factor_N[:, None], edge_N[:, None], last_N[:, None],
        scale_N[:, None], is_dense,
    )  # fmt: skip


@triton.jit
def u52_of(high, low):
    """A float64 in the open interval (0, 1) from two 32-bit words: 52 bits and a half, exact."""
    word = (high.to(tl.int64) << 20) | (low.to(tl.int64) >> 12)
    return (word.to(tl.float64) + 0.5) * 2.220446049250313e-16  # 2 ** -52


@triton.jit
def uniform_of(UNIFORMS, SEEDS, WORDS, request, column, num_columns, plane, is_given, is_on):
    """A uniform of each request: as it was given, or the `u52` of its counter words."""
    at = request * num_columns + column
    if is_given:
        u = tl.load(UNIFORMS + at, mask=is_on, other=0.5)
    else:
        seed = tl.load(SEEDS + request, mask=is_on, other=0)
        c1 = tl.load(WORDS + at, mask=is_on, other=0).to(tl.int32)
        c2 = tl.load(WORDS + plane + at, mask=is_on, other=0).to(tl.int32)
        c3 = tl.load(WORDS + 2 * plane + at, mask=is_on, other=0).to(tl.int32)
        high, low, _, _ = tl.philox(seed, tl.zeros_like(c1), c1, c2, c3)
        u = u52_of(high, low)
    return u
