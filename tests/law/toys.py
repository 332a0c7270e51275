"""Policies as tables, chosen so that each way to be wrong shows in one; V is 3 unless a toy says so."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tests.law.integrate import Tokens, Toy


def _random_weights(vocab_size: int, smallest: int, *key: int) -> list[int]:
    """Fixed weights of smallest..6 that any change of the key changes."""
    weights = np.random.default_rng([vocab_size, *key]).integers(smallest, 7, vocab_size)
    return weights.tolist() if weights.any() else [1] * vocab_size


def _target(vocab_size: int, smallest: int) -> Callable[[Tokens], list[int]]:
    return lambda history: _random_weights(vocab_size, smallest, 1, *(token + 1 for token in history))


def _draft(vocab_size: int, smallest: int) -> Callable[[Tokens, int], list[int]]:
    return lambda history, i: _random_weights(vocab_size, smallest, 2, i, *(token + 1 for token in history))


def _without(weights: list[int], token: int) -> list[int]:
    return [0 if i == token % len(weights) else weight for i, weight in enumerate(weights)]


def _rotated(weights: list[float], by: int) -> list[float]:
    by %= len(weights)
    return weights[by:] + weights[:by]


def _by_position(history: Tokens) -> list[float]:
    return _rotated([6, 3, 1], len(history))


def _stochastic(vocab_size: int = 3, **temperatures: float) -> Toy:
    return Toy(
        vocab_size=vocab_size,
        target_weights=_target(vocab_size, 1),
        draft_weights=_draft(vocab_size, 1),
        **temperatures,
    )


TOYS = {
    "stochastic": _stochastic(),
    "four_tokens": _stochastic(4),
    # A zero in every row, of the target and of the draft, at places that sometimes meet.
    "zeros": Toy(
        vocab_size=3,
        target_weights=lambda history: _without(_target(3, 1)(history), sum(history) + len(history)),
        draft_weights=lambda history, i: _without(_draft(3, 1)(history, i), 2 * i + len(history)),
    ),
    # The draft holds nothing the target can take, so that everything is rejected.
    "disjoint": Toy(
        vocab_size=3,
        target_weights=lambda history: _without(_target(3, 1)(history), len(history)),
        draft_weights=lambda history, i: np.eye(3)[(len(history) + i) % 3].tolist(),
    ),
    "opposite": Toy(
        vocab_size=3,
        target_weights=lambda history: _rotated([6, 3, 1], sum(history)),
        draft_weights=lambda history, i: [1, 3, 6],
    ),
    "rare_tail": Toy(
        vocab_size=3,
        target_weights=lambda history: _rotated([1.0, 1e-9, 1e-4], len(history)),
        draft_weights=lambda history, i: _rotated([1e-4, 1e-8, 1.0], len(history) + i),
    ),
    "argmax_draft": _stochastic(draft_temperature=0),
    # Row i of this target depends on the position alone, hence the draft can equal it.
    "identical": Toy(
        vocab_size=3,
        target_weights=_by_position,
        draft_weights=lambda history, i: _by_position((*history, *(0,) * i)),
    ),
    "greedy": _stochastic(temperature=0),
    "greedy_argmax_draft": _stochastic(temperature=0, draft_temperature=0),
    "hot": _stochastic(temperature=1.7, draft_temperature=0.6),
    "cold": _stochastic(temperature=0.4, draft_temperature=1.3),
}


def rows(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draft logits (V,) and target logits (2, V), as far apart as a fair draft is from its target."""
    generator = torch.Generator().manual_seed(seed)
    target_LV = 2 * torch.randn(2, size, generator=generator)
    return target_LV[0] + 0.7 * torch.randn(size, generator=generator), target_LV
