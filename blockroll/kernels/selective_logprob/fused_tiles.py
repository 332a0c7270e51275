"""The kernels of `selective_logprob`: tiles of logits, and what becomes of them.

Forward, a program multiplies a block of tokens with one section of the vocabulary, tile after tile, and keeps
of each token the largest logit, the sum of exponentials relative to it, and what entropy needs (`sections`);
`join` adds the sections in their order. Backward, the logits of some entries are made once more and turned
into their gradients (`gradients_of_logits`), which `add_product` multiplies with the head.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

MAX_SECTIONS = 256
NOTHING = tl.constexpr(-200.0)  # exp of it is 0 in float32, and 0 times it is a number, unlike -inf
JOINED_ROWS = 16  # tokens whose sections one program joins
INTERPRETED = triton.knobs.runtime.interpret  # its products of bfloat16 are wrong: operands go up first
# What changes from call to call, and would have a kernel compiled anew where it is 1 or 16 divides it.
COUNTS = ("num_rows", "vocab_size", "first", "num_tiles", "num_sections", "has_bias", "with_entropy", "depth")


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a product is cut: tokens by vocabulary entries, in steps along the width."""

    rows: int
    entries: int
    depth: int
    num_warps: int
    num_stages: int


# What ships. Three buffers hide loads on NVIDIA's; on AMD's two do, and a second block fits beside them.
# Float32 takes twice the registers, and so do rows that cannot be loaded 16 bytes at a time.
HALF_NVIDIA = Tiles(128, 128, 64, num_warps=8, num_stages=3)
HALF_AMD = Tiles(128, 128, 64, num_warps=8, num_stages=2)
FLOAT = Tiles(64, 128, 32, num_warps=8, num_stages=2)
ODD = Tiles(64, 64, 32, num_warps=8, num_stages=2)


def tiles_of(*, is_half: bool, is_even: bool, is_amd: bool) -> Tiles:
    """For operands of 16 bits or 32; even is a width that 64 divides."""
    if not is_even:
        return ODD
    if not is_half:
        return FLOAT
    return HALF_AMD if is_amd else HALF_NVIDIA


@triton.jit
def logits_of_tile(
    states, weight, bias, rows, entries, width, state_stride, weight_stride, has_bias, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_W: tl.constexpr, EVEN: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Capped logits (BLOCK_N, BLOCK_V) in float32, of rows and entries that exist."""
    depth = tl.arange(0, BLOCK_W)
    state_at = states + rows.to(tl.int64)[:, None] * state_stride + depth[None, :]
    weight_at = weight + entries.to(tl.int64)[None, :] * weight_stride + depth[:, None]
    logits = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, width, BLOCK_W):
        if EVEN:
            some_states, some_weight = tl.load(state_at), tl.load(weight_at)
        else:
            is_inside = start + depth < width
            some_states = tl.load(state_at, mask=is_inside[None, :], other=0.0)
            some_weight = tl.load(weight_at, mask=is_inside[:, None], other=0.0)
        if UP:
            some_states, some_weight = some_states.to(tl.float32), some_weight.to(tl.float32)
        logits = tl.dot(some_states, some_weight, logits, input_precision="ieee")
        state_at += BLOCK_W
        weight_at += BLOCK_W
    if has_bias:
        logits += tl.load(bias + entries)[None, :]
    if softcap > 0:
        logits = softcap * (1 - 2 / (tl.exp(logits * (2 / softcap)) + 1))  # tanh, also where exp is infinite
    return logits


@triton.jit(do_not_specialize=COUNTS)
def sections(
    states, weight, bias, tokens, temperature, maxima, sums, moments, chosen,
    num_rows, vocab_size, width, state_stride, weight_stride, num_tiles, num_sections, has_bias, softcap,
    with_entropy,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_W: tl.constexpr, EVEN: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Of each token and section: the largest logit m, sum of exp(z - m), sum of exp(z - m) * (z - m)."""
    section = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < num_rows
    rows = tl.minimum(row, num_rows - 1)
    token = tl.load(tokens + rows)
    inverse = 1 / tl.load(temperature + rows)
    largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)
    found = tl.zeros((BLOCK_N,), tl.float32)
    begin = section * num_tiles * BLOCK_V
    for tile in range(num_tiles):
        entry = begin + tile * BLOCK_V + tl.arange(0, BLOCK_V)
        logits = logits_of_tile(
            states, weight, bias, rows, tl.minimum(entry, vocab_size - 1), width, state_stride, weight_stride,
            has_bias, softcap, BLOCK_N, BLOCK_V, BLOCK_W, EVEN, UP,
        )  # fmt: skip
        scaled = logits * inverse[:, None]
        found += tl.sum(tl.where(entry[None, :] == token[:, None], scaled, 0.0), axis=1)
        scaled += tl.where(entry < vocab_size, 0.0, float("-inf"))[None, :]
        larger = tl.maximum(largest, tl.max(scaled, axis=1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        old = tl.exp(largest - shift)
        exponentials = tl.exp(scaled - shift[:, None])
        if with_entropy:
            moment = old * (moment + total * tl.maximum(largest - shift, NOTHING))
            moment += tl.sum(exponentials * tl.maximum(scaled - shift[:, None], NOTHING), axis=1)
        total = old * total + tl.sum(exponentials, axis=1)
        largest = larger
    cell = row.to(tl.int64) * num_sections + section
    tl.store(maxima + cell, largest, mask=is_row)
    tl.store(sums + cell, total, mask=is_row)
    if with_entropy:
        tl.store(moments + cell, moment, mask=is_row)
    is_here = (token >= begin) & (token < begin + num_tiles * BLOCK_V) & (token < vocab_size)
    tl.store(chosen + row, found, mask=is_row & is_here)


@triton.jit(do_not_specialize=COUNTS)
def join(
    maxima, sums, moments, chosen, logprobs, entropies, log_sums, num_rows, num_sections, with_entropy,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The law of each token from what its sections gave."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(row, num_rows - 1)
    section = tl.arange(0, BLOCK_S)
    cell = rows.to(tl.int64)[:, None] * num_sections + section[None, :]
    is_cell = (section < num_sections)[None, :]
    largest = tl.load(maxima + cell, mask=is_cell, other=float("-inf"))
    total = tl.load(sums + cell, mask=is_cell, other=0.0)
    shift = tl.max(largest, axis=1)
    shift = tl.where(shift == float("-inf"), 0.0, shift)
    share = tl.exp(largest - shift[:, None])
    whole = tl.sum(total * share, axis=1)
    log_sum = shift + tl.log(whole)
    tl.store(log_sums + row, log_sum, mask=row < num_rows)
    tl.store(logprobs + row, tl.load(chosen + rows) - log_sum, mask=row < num_rows)
    if with_entropy:
        moment = tl.load(moments + cell, mask=is_cell, other=0.0)
        moment += total * tl.maximum(largest - shift[:, None], NOTHING)
        tl.store(entropies + row, tl.log(whole) - tl.sum(share * moment, axis=1) / whole, mask=row < num_rows)


@triton.jit(do_not_specialize=COUNTS)
def gradients_of_logits(
    states, weight, bias, tokens, temperature, log_sums, gradients, out,
    num_rows, vocab_size, width, state_stride, weight_stride, out_stride, first, has_bias, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_W: tl.constexpr, EVEN: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """The gradients of the logits before their cap, from entry `first` on; zeros behind the vocabulary."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(row, num_rows - 1)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    entry = first + column
    logits = logits_of_tile(
        states, weight, bias, rows, tl.minimum(entry, vocab_size - 1), width, state_stride, weight_stride,
        has_bias, softcap, BLOCK_N, BLOCK_V, BLOCK_W, EVEN, UP,
    )  # fmt: skip
    inverse = 1 / tl.load(temperature + rows)
    factor = tl.load(gradients + rows) * inverse
    law = tl.exp(logits * inverse[:, None] - tl.load(log_sums + rows)[:, None])
    is_chosen = entry[None, :] == tl.load(tokens + rows)[:, None]
    gradient = factor[:, None] * (tl.where(is_chosen, 1.0, 0.0) - law)
    if softcap > 0:
        gradient *= 1 - (logits / softcap) * (logits / softcap)
    gradient = tl.where((entry < vocab_size)[None, :], gradient, 0.0)
    at = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(at, gradient.to(out.dtype.element_ty), mask=(row < num_rows)[:, None])


@triton.jit(do_not_specialize=COUNTS)
def add_product(
    left, weight, out, num_rows, vocab_size, width, depth, left_stride, weight_stride, first,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """out += left @ weight[first:], of 16 bits, summed in float32; left is 0 behind the vocabulary."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    columns = tl.minimum(column, width - 1)
    inner = tl.arange(0, BLOCK_K)
    left_at = left + tl.minimum(row, num_rows - 1).to(tl.int64)[:, None] * left_stride + inner[None, :]
    at = out + row.to(tl.int64)[:, None] * width + column[None, :]
    is_inside = (row < num_rows)[:, None] & (column < width)[None, :]
    total = tl.load(at, mask=is_inside, other=0.0)
    for start in range(0, depth, BLOCK_K):
        entry = tl.minimum(first + start + inner, vocab_size - 1).to(tl.int64)
        some_left = tl.load(left_at)
        some_weight = tl.load(weight + entry[:, None] * weight_stride + columns[None, :])
        if UP:
            some_left, some_weight = some_left.to(tl.float32), some_weight.to(tl.float32)
        total = tl.dot(some_left, some_weight, total, input_precision="ieee")
        left_at += BLOCK_K
    tl.store(at, total, mask=is_inside)
