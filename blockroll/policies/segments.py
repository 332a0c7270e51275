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
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """Rows that hold tokens, one text, and blocks of masks behind it, each a text's end of its own."""

    num_clean: int
    # In their order, the clean row that each block stands behind, -1 for the cached prefix, and its masks.
    blocks: tuple[tuple[int, int], ...] = ()

    @property
    def parents(self) -> tuple[int, ...]:
        """The row before each row in its text; -1: the cached prefix."""
        parents = list(range(-1, self.num_clean - 1))
        for before, num_masks in self.blocks:
            first = len(parents)
            parents += [before, *range(first, first + num_masks - 1)][:num_masks]
        return tuple(parents)


def draft_segments(num_clean: int, num_drafts: int) -> Segments:
    """Of a two-forward layout: K masks behind the last token."""
    return Segments(num_clean=num_clean, blocks=((num_clean - 1, num_drafts),) if num_drafts else ())


def fused_segments(num_drafts: int, levels: tuple[int, ...]) -> Segments:
    """Of a fused layout: behind the anchor and as many drafts as its level, a proposal of K + 1 masks."""
    width = num_drafts + 1
    return Segments(num_clean=width, blocks=tuple((level, width) for level in levels))


def before(rows_BRW: Tensor, seed_BDW: Tensor, segments: Segments) -> Tensor:
    """The D rows before each row in its text (B, R, D, W), the oldest first.

    `seed_BDW` are the last D rows of the cached prefix. Rows before a text's first token must be zero.
    """
    places_RD = _places_before(segments, seed_BDW.shape[1], rows_BRW.device)
    return torch.cat([seed_BDW, rows_BRW], dim=1)[:, places_RD]


def convolve(rows_BRW: Tensor, seed_BDW: Tensor, taps_WT: Tensor, segments: Segments) -> Tensor:
    """The causal depthwise convolution (B, R, W) of each row, whose the last tap is, and the D before it."""
    taken_BRTW = torch.cat([before(rows_BRW, seed_BDW, segments), rows_BRW[:, :, None]], dim=2)
    return torch.einsum("brtw,wt->brw", taken_BRTW, taps_WT)


def scan(
    step: Callable[[Tensor, Tensor], Tensor], rows_BR: Tensor, seed_B: Tensor, segments: Segments
) -> Tensor:
    """The state behind each row (B, R, ...), where `step(state, row)` goes from the state before it.

    It is the definition of a linear recurrence over segments. A kernel may take a block at a time: its rows
    follow one another.
    """
    states: list[Tensor] = []
    for row, parent in enumerate(segments.parents):
        states.append(step(seed_B if parent < 0 else states[parent], rows_BR[:, row]))
    return torch.stack(states, dim=1)


def last_rows(rows_BRW: Tensor, seed_BDW: Tensor, segments: Segments, rows_BC: Tensor | None) -> Tensor:
    """The seed of `before` behind each row that is asked for (B, C, D, W); None: behind all clean ones."""
    depth, num_clean = seed_BDW.shape[1], segments.num_clean
    known = torch.cat([seed_BDW, rows_BRW[:, :num_clean]], dim=1)
    windows_BRDW = known.unfold(1, depth, 1)[:, 1:].transpose(2, 3)
    return at_rows(windows_BRDW, segments, rows_BC)


def at_rows(states_BR: Tensor, segments: Segments, rows_BC: Tensor | None) -> Tensor:
    """Of the states behind each row, those of the rows that are asked for (B, C, ...); None: clean ones."""
    if rows_BC is None:
        return states_BR[:, : segments.num_clean]
    return states_BR[torch.arange(len(states_BR), device=states_BR.device)[:, None], rows_BC]


@lru_cache(maxsize=64)
def _places_before(segments: Segments, depth: int, device: torch.device) -> Tensor:
    """Where the rows before each row lie, int64 (R, D), behind D rows of the prefix."""
    parents = segments.parents
    places: list[list[int]] = []
    for parent in parents:
        taken: list[int] = []
        while parent >= 0 and len(taken) < depth:
            taken.append(depth + parent)
            parent = parents[parent]
        missing = depth - len(taken)
        places.append([*range(depth - missing, depth), *reversed(taken)])
    return torch.tensor(places, device=device).view(len(parents), depth)
