"""A policy as small tables, and the pair of functions under test."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from blockroll.errors import InvalidInput
from blockroll.kernels.block_verify import verify_block
from blockroll.kernels.draft_draw import draw_draft
from blockroll.types import Draft, Verdict

Tokens = tuple[int, ...]


class Sampler(NamedTuple):
    """The pair under test, called as production calls it.

    `draw_draft(logits_BKV, temperature_B, uniforms_BK)` draws K drafts per row, each by its own uniform.
    `verify_block(draft, target_probs_BLV, uniforms_BL)` decides with K accept coins and a last uniform for
    the token after the accepted drafts; or, of point masses, draws the token of each row by its uniform, and
    accepts the drafts that are these tokens. Everything is float64; token i of a law is its i-th interval of
    (0, 1).
    """

    draw_draft: Callable[[Tensor, Tensor, Tensor], Draft]
    verify_block: Callable[[Draft, Tensor, Tensor], Verdict]


PRODUCTION = Sampler(draw_draft, verify_block)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """A policy as tables. Weights are (V,) and need not sum to one; the logits are their logarithms."""

    vocab_size: int
    target_weights: Callable[[Tokens], Sequence[float]]  # of the token that follows this history
    # of draft i of a step that starts after this history
    draft_weights: Callable[[Tokens, int], Sequence[float]]
    temperature: float = 1.0  # of the target; 0 is greedy
    draft_temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise InvalidInput(f"tables need a vocabulary of at least 1 token, got {self.vocab_size}")
        for name in ("temperature", "draft_temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InvalidInput(f"{name} of tables must be at least 0, got {value}; 0 means greedy")

    def target_V(self, history: Tokens) -> np.ndarray:
        """The law of the token after `history`."""
        return tempered(self._row(self.target_weights(history), f"target row {history}"), self.temperature)

    def draft_V(self, history: Tokens, offset: int) -> np.ndarray:
        """The law of draft `offset` in a step that starts after `history`."""
        row = self._row(self.draft_weights(history, offset), f"draft row {offset} after {history}")
        return tempered(row, self.draft_temperature)

    def _row(self, weights_V: Sequence[float], name: str) -> Sequence[float]:
        row = np.asarray(weights_V, dtype=np.float64)
        if row.shape != (self.vocab_size,) or not np.isfinite(row).all() or row.min() < 0 or not row.any():
            raise InvalidInput(
                f"{name} must be {self.vocab_size} finite weights of at least 0, not all of them 0, got "
                f"{list(weights_V)}"
            )
        return weights_V


def tempered(weights_V: Sequence[float], temperature: float) -> np.ndarray:
    """weights ** (1 / temperature), normalised; at 0 a point mass on the first largest weight."""
    weights = np.asarray(weights_V, dtype=np.float64)
    if temperature == 0:
        return np.asarray(np.eye(len(weights))[weights.argmax()])
    powered = weights ** (1 / temperature)
    return np.asarray(powered / powered.sum())
