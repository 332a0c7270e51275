"""Which row stands before each new row of a forward, for layers that read their neighbours.

A mask tells attention what a row may see. Convolutions, values delayed by a token and linear recurrences go
by the order of rows instead, and rows of one forward are not one text: a proposal stands behind the drafts
that its level assumes, not behind the proposal that happens to lie before it. So every row has a *parent*,
the row before it in its own text, and layers go from parent to parent; where the forward begins, to the state
that the cache holds.

Shapes: B requests, R rows, D rows that a layer looks back, T = D + 1 taps, W channels, C rows whose states
are asked for.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from blockroll.kernels.block_attention import RowLayout

Parents = tuple[int, ...]  # by row; -1: the cached prefix


@lru_cache(maxsize=64)
def parents_of(layout: RowLayout) -> Parents:
    """Of a clean row the one before it, of a block's first mask the last clean row that its level sees."""
    parents = list(range(-1, layout.num_clean - 1))
    for level in layout.levels:
        first = len(parents)
        parents += [level, *range(first, first + layout.width - 1)]
    return tuple(parents)


def before(rows_BRW: Tensor, seed_BDW: Tensor, parents: Parents) -> Tensor:
    """The D rows before each row in its text (B, R, D, W), the oldest first.

    `seed_BDW` are the last D rows of the cached prefix. Rows before a text's first token must be zero.
    """
    places_RD = _places_before(parents, seed_BDW.shape[1], rows_BRW.device)
    return torch.cat([seed_BDW, rows_BRW], dim=1)[:, places_RD]


def convolve(rows_BRW: Tensor, seed_BDW: Tensor, taps_WT: Tensor, parents: Parents) -> Tensor:
    """The causal depthwise convolution (B, R, W) of each row, whose the last tap is, and the D before it."""
    taken_BRTW = torch.cat([before(rows_BRW, seed_BDW, parents), rows_BRW[:, :, None]], dim=2)
    return torch.einsum("brtw,wt->brw", taken_BRTW, taps_WT)


def scan(
    step: Callable[[Tensor, Tensor], Tensor], rows_BR: Tensor, seed_B: Tensor, parents: Parents
) -> Tensor:
    """The state behind each row (B, R, ...), where `step(state, row)` goes from the state before it.

    It is the definition of a linear recurrence. A kernel may take the clean rows and then each block at a
    time: in them rows follow one another.
    """
    states: list[Tensor] = []
    for row, parent in enumerate(parents):
        states.append(step(seed_B if parent < 0 else states[parent], rows_BR[:, row]))
    return torch.stack(states, dim=1)


def last_rows(clean_BRW: Tensor, seed_BDW: Tensor, rows_BC: Tensor | None) -> Tensor:
    """Of clean rows, the seed of `before` behind those that are asked for (B, C, D, W); None: behind all."""
    known = torch.cat([seed_BDW, clean_BRW], dim=1)
    return at_rows(known.unfold(1, seed_BDW.shape[1], 1)[:, 1:].transpose(2, 3), rows_BC)


def at_rows(states_BR: Tensor, rows_BC: Tensor | None) -> Tensor:
    """Of the states behind clean rows, those that are asked for (B, C, ...); None: all."""
    if rows_BC is None:
        return states_BR
    return states_BR[torch.arange(len(states_BR), device=states_BR.device)[:, None], rows_BC]


@lru_cache(maxsize=64)
def _places_before(parents: Parents, depth: int, device: torch.device) -> Tensor:
    """Where the rows before each row lie, int64 (R, D), behind D rows of the prefix."""
    places: list[list[int]] = []
    for parent in parents:
        taken: list[int] = []
        while parent >= 0 and len(taken) < depth:
            taken.append(depth + parent)
            parent = parents[parent]
        places.append([*range(len(taken), depth), *reversed(taken)])
    return torch.tensor(places, device=device).view(len(parents), depth)
