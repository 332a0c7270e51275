"""Counter-based uniforms: the same request meets the same coins in any batch, on any replica.

Philox4x32-10 (Salmon et al. 2011), bit-identical to Triton's `tl.philox` with 32-bit counters. Keyed
by the request's 64-bit seed; the counter words are

    c0 = 0    c1 = absolute token position    c2 = purpose    c3 = attempt

Plain steps, and steps whose drafts are point masses, draw the token of a position by the one coin of that
position: its purpose is TOKEN and its attempt 0, whatever was tried before. It decides one committed token
and nothing else, so a text is a function of weights and coins alone.

Drafts that were drawn need coins of three purposes, whose attempt counts the decoding forwards the request
has run. A position that is drafted, rejected and drafted again therefore never meets a word that has already
influenced an outcome. Where such drafts and looked-up ones take turns, each serving of a request counts from
a number of its own: a text that its seed drew before may come back as a draft, and must not know coins to
come.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockroll.kernels import transfer

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_NUM_ROUNDS = 10


class Purpose(IntEnum):
    """What a uniform decides; one purpose per use, so that no coin serves twice."""

    DRAFT = 0
    ACCEPT = 1
    FINAL = 2  # the token after the accepted drafts, from the residual or the extra row
    TOKEN = 3  # the token of a position, from the target


def philox4x32(
    seed: Tensor, c0: Tensor | int, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (in int64) per element of the broadcast arguments."""
    # The products of words 0 and 2 are taken together: x = (c0, c2), y = (c1, c3).
    # On a CPU the same in NumPy, whose small operations cost a fraction of torch's.
    if transfer.is_free(seed.device):
        seeds, *given = (
            word.numpy() if isinstance(word, Tensor) else np.int64(word) for word in (seed, c0, c1, c2, c3)
        )
        shape = np.broadcast_shapes(seeds.shape, *(word.shape for word in given))
        keys, xs, ys = (np.empty((2, *shape), dtype=np.int64) for _ in range(3))
        keys[0], keys[1] = seeds, seeds >> 32
        xs[0], ys[0], xs[1], ys[1] = given
        words = _rounds(
            xs & _MASK, ys & _MASK, keys & _MASK, constants=np.array, swap=lambda pair: pair[::-1]
        )
        x02, x13 = (torch.from_numpy(pair.copy()) for pair in words)
        return x02[0], x13[0], x02[1], x13[1]
    counters = [
        word if isinstance(word, Tensor) else seed.new_full((), word, dtype=torch.int64)
        for word in (c0, c1, c2, c3)
    ]
    seed, *counters = torch.broadcast_tensors(seed, *counters)  # type: ignore[no-untyped-call]
    key = torch.stack([seed & _MASK, (seed >> 32) & _MASK])
    x = torch.stack([counters[0], counters[2]]) & _MASK
    y = torch.stack([counters[1], counters[3]]) & _MASK
    x, y = _rounds(x, y, key, constants=partial(_constants, device=seed.device), swap=torch.flipud)
    return x[0], y[0], x[1], y[1]


def _rounds(
    x: Any, y: Any, key: Any, *, constants: Callable[[Any], Any], swap: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """All rounds, in torch or NumPy: how either makes an array, and exchanges the two words of one."""
    lead = (2,) + (1,) * (x.ndim - 1)
    multiplier, key_step = (constants(pair).reshape(lead) for pair in (_MULTIPLIERS, _KEY_STEPS))
    rounds = constants(range(_NUM_ROUNDS)).reshape(-1, *(1 for _ in x.shape))
    for round_key in (key + rounds * key_step) & _MASK:
        # The signed product wraps, but its 64 bits are those of the unsigned one.
        product = multiplier * x
        x, y = swap((product >> 32) & _MASK) ^ y ^ round_key, swap(product & _MASK)
    return x, y


@lru_cache(maxsize=64)
def _constants(values: Sequence[int], device: torch.device) -> Tensor:
    """Sent there once."""
    return torch.tensor(values, device=device)


def u52(high: Tensor, low: Tensor) -> Tensor:
    """A float64 in the open interval (0, 1) from two 32-bit words: 52 bits and a half, exact."""
    return (((high << 20) | (low >> 12)).to(torch.float64) + 0.5) * 2.0**-52


def step_uniforms(
    seeds_B: Tensor,
    positions_B: Tensor,
    attempts_B: Tensor,
    num_drafts: int,
    *,
    settles: bool = False,
    by_position: Tensor | bool = False,
) -> tuple[Tensor, Tensor]:
    """The uniforms of one decoding step: float64 (B, K) for drafting and (B, K + 1) for verifying.

    `positions_B` is the position of the first token the step can commit. Of requests that go `by_position`,
    bool (B,), each verify uniform draws the token of its position. Of the others they are accept coins, and
    the last one draws the token after the accepted drafts; a step that settles its first position has one
    more behind it, for the token that replaces a rejected first draft.
    """
    offsets, purposes, is_verify = _words_of_step(num_drafts, settles, seeds_B.device)
    attempts_B1 = attempts_B[:, None]
    if by_position is not False:
        is_token = is_verify if by_position is True else is_verify & by_position[:, None]
        purposes = torch.where(is_token, int(Purpose.TOKEN), purposes)
        attempts_B1 = torch.where(is_token, 0, attempts_B1)
    words = philox4x32(seeds_B[:, None], 0, positions_B[:, None] + offsets, purposes, attempts_B1)
    uniforms = u52(words[0], words[1])
    return uniforms[:, :num_drafts], uniforms[:, num_drafts:]


def token_uniforms(seeds_N: Tensor, positions_N: Tensor) -> Tensor:
    """The one coin of each position, float64 (N,): what draws its token unless its draft was drawn."""
    words = philox4x32(seeds_N, 0, positions_N, int(Purpose.TOKEN), 0)
    return u52(words[0], words[1])


@lru_cache(maxsize=64)
def _words_of_step(num_drafts: int, settles: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of every coin of a step, drafts, accepts, and then the tokens that are drawn: offset, purpose, and
    whether it verifies."""
    offsets_K = torch.arange(num_drafts, device=device)
    final_offsets = torch.tensor([num_drafts, 0] if settles else [num_drafts], device=device)
    offsets = torch.cat([offsets_K, offsets_K, final_offsets])
    purposes = (
        offsets_K.new_full((num_drafts,), Purpose.DRAFT),
        offsets_K.new_full((num_drafts,), Purpose.ACCEPT),
        torch.full_like(final_offsets, Purpose.FINAL),
    )
    return offsets, torch.cat(purposes), torch.arange(len(offsets), device=device) >= num_drafts
