"""Uniforms by counter, Philox4x32-10 (Salmon et al. 2011): as numbers, or as the words they are made from.

Bit-identical to Triton's `tl.philox` with 32-bit counters. Keyed by a request's 64-bit seed; what the counter
words stand for is said where they are made (`samplers/uniforms.py`).

Shapes: B requests, N uniforms of each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from blockroll.kernels import transfer

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_NUM_ROUNDS = 10


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


@dataclass(frozen=True, slots=True)
class Coins:
    """Uniforms that nobody has drawn yet: `u52` of the first two words of `philox4x32(seed, 0, *words)`.

    Stands where a tensor of uniforms (B, N) does, and is indexed as one; kernels draw them where they decide.
    """

    seeds_B: Tensor  # int64
    words_3BN: Tensor  # int64: counter words 1 to 3

    @classmethod
    def of(cls, seeds_B: Tensor, *words: Tensor) -> Self:
        """From three counter words, each of a shape that broadcasts to (B, N)."""
        return cls(seeds_B, torch.stack(torch.broadcast_tensors(*words)))  # type: ignore[no-untyped-call]

    @property
    def shape(self) -> torch.Size:
        return self.words_3BN.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """That of the uniforms."""
        return torch.float64

    @property
    def device(self) -> torch.device:
        return self.seeds_B.device

    def dim(self) -> int:
        return 2

    def __getitem__(self, index: tuple[slice, slice | list[int]]) -> Self:
        requests, columns = index
        return replace(
            self, seeds_B=self.seeds_B[requests], words_3BN=self.words_3BN[:, requests][:, :, columns]
        )

    def uniforms(self) -> Tensor:
        """The numbers, float64 (B, N)."""
        words = philox4x32(self.seeds_B[:, None], 0, *self.words_3BN)
        return u52(words[0], words[1])


Uniforms = Tensor | Coins  # float64 (B, N)


def drawn(uniforms: Uniforms) -> Tensor:
    """As numbers."""
    return uniforms.uniforms() if isinstance(uniforms, Coins) else uniforms


def beside(first: Uniforms, second: Uniforms) -> Uniforms:
    """The columns of one, and then of the other; both of one kind, and of the same requests."""
    if isinstance(first, Coins):
        assert isinstance(second, Coins)
        return replace(first, words_3BN=torch.cat([first.words_3BN, second.words_3BN], dim=2))
    assert isinstance(second, Tensor)
    return torch.cat([first, second], dim=1)


def either(is_first_B: Tensor, first: Uniforms, second: Uniforms) -> Uniforms:
    """Of each request those of one or of the other; both of one kind, and of the same requests."""
    if isinstance(first, Coins):
        assert isinstance(second, Coins)
        words_3BN = torch.where(is_first_B[:, None], first.words_3BN, second.words_3BN)
        return replace(first, words_3BN=words_3BN)
    assert isinstance(second, Tensor)
    return torch.where(is_first_B[:, None], first, second)
