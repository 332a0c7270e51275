"""Counter-based uniforms: the same request meets the same coins in any batch, on any replica.

Philox4x32-10 (`kernels/philox.py`), keyed by the request's 64-bit seed; the counter words are

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

from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

from blockroll.kernels.philox import Coins, philox4x32, u52


class Purpose(IntEnum):
    """What a uniform decides; one purpose per use, so that no coin serves twice."""

    DRAFT = 0
    ACCEPT = 1
    FINAL = 2  # the token after the accepted drafts, from the residual or the extra row
    TOKEN = 3  # the token of a position, from the target


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
    counters = _counters(positions_B, attempts_B, num_drafts, settles, by_position)
    words = philox4x32(seeds_B[:, None], 0, *counters)
    uniforms = u52(words[0], words[1])
    return uniforms[:, :num_drafts], uniforms[:, num_drafts:]


def step_coins(
    seeds_B: Tensor,
    positions_B: Tensor,
    attempts_B: Tensor,
    num_drafts: int,
    *,
    settles: bool = False,
    by_position: Tensor | bool = False,
) -> tuple[Coins, Coins]:
    """The same uniforms as `step_uniforms`, for kernels that draw them where they decide."""
    coins = Coins.of(seeds_B, *_counters(positions_B, attempts_B, num_drafts, settles, by_position))
    return coins[:, :num_drafts], coins[:, num_drafts:]


def token_uniforms(seeds_N: Tensor, positions_N: Tensor) -> Tensor:
    """The one coin of each position, float64 (N,): what draws its token unless its draft was drawn."""
    words = philox4x32(seeds_N, 0, positions_N, int(Purpose.TOKEN), 0)
    return u52(words[0], words[1])


def _counters(
    positions_B: Tensor,
    attempts_B: Tensor,
    num_drafts: int,
    settles: bool,
    by_position: Tensor | bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Counter words 1 to 3 of every coin of a step, which broadcast."""
    offsets, purposes, is_verify = _words_of_step(num_drafts, settles, positions_B.device)
    attempts_B1 = attempts_B[:, None]
    if by_position is not False:
        is_token = is_verify if by_position is True else is_verify & by_position[:, None]
        purposes = torch.where(is_token, int(Purpose.TOKEN), purposes)
        attempts_B1 = torch.where(is_token, 0, attempts_B1)
    return positions_B[:, None] + offsets, purposes, attempts_B1


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
