"""Bets against the mean of a bounded value: sums that may be added, over steps, replicas and processes.

A value y in [0, 1] is claimed to have, given all that came before it, a mean of at least `low` and at most
`high`. Who doubts that bets a share of a wealth of 1:

    above:  W = product of 1 + r_g (y - high),      r_g = 2^-g / high
    below:  W = product of 1 - r_g (y - low),       r_g = 2^-g / (1 - low),      g = 1 .. 8

Under the claim each factor has mean at most 1, whatever was seen before, so each W is a nonnegative
supermartingale from 1, and so is every mean of them: P(it ever reaches 1 / alpha) <= alpha (Ville). The grid
of g needs no tuning, and its logarithms are sums, which is why evidence of many replicas is added.
Source: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting" (2024).

Shapes: N values, G bets of each side.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from blockroll.errors import InvalidInput

NUM_BETS = 8
_SHARES_G = 0.5 ** np.arange(1, NUM_BETS + 1)
_LEAST = 1e-12  # of a mean that a bet divides by: the claim is then that much wider


@dataclass(frozen=True, slots=True, eq=False)
class Bets:
    """Logarithms of the wealth of every bet, and what was bet on."""

    num_values: int
    log_wealth_2G: np.ndarray  # float64, nats: above, then below
    excess: float  # sum of y - (low + high) / 2

    @classmethod
    def none(cls) -> Self:
        """Nothing was bet on."""
        return cls(0, np.zeros((2, NUM_BETS)), 0.0)

    @classmethod
    def on(cls, values_N: np.ndarray, low_N: np.ndarray | float, high_N: np.ndarray | float) -> Self:
        """Of values, each with its claim. InvalidInput unless all lie in [0, 1] and low <= high."""
        values_N = np.asarray(values_N, dtype=np.float64)
        low_N = np.broadcast_to(np.asarray(low_N, dtype=np.float64), values_N.shape)
        high_N = np.broadcast_to(np.asarray(high_N, dtype=np.float64), values_N.shape)
        if not ((values_N >= 0) & (values_N <= 1)).all():
            bad = values_N[~((values_N >= 0) & (values_N <= 1))][0]
            raise InvalidInput(
                f"a value to bet on must be between 0 and 1, got {bad}; scale it by its bounds"
            )
        if not (low_N <= high_N).all():
            raise InvalidInput("the least mean of a claim must be at most its greatest")
        excess = float((values_N - (low_N + high_N) / 2).sum())
        return cls(len(values_N), log_wealth(values_N, low_N, high_N), excess)

    @classmethod
    def on_ratios(cls, ratios_N: np.ndarray, greatest: float = 1.0) -> Self:
        """Of values from 0 on, without bound, claimed to have a mean of at most `greatest`; nothing below.

        Rates are 2^-g / greatest, so that no factor is under 1/2. InvalidInput for NaN and below 0.
        """
        ratios_N = np.asarray(ratios_N, dtype=np.float64)
        if not (ratios_N >= 0).all():
            raise InvalidInput(f"a ratio of laws must be at least 0, got {ratios_N[~(ratios_N >= 0)][0]}")
        above_G = _log_factors(ratios_N / greatest - 1.0)
        return cls(len(ratios_N), np.stack([above_G, np.zeros(NUM_BETS)]), float((ratios_N - greatest).sum()))

    def __add__(self, other: "Bets") -> "Bets":
        return Bets(
            self.num_values + other.num_values,
            self.log_wealth_2G + other.log_wealth_2G,
            self.excess + other.excess,
        )


def log_wealth(values_N: np.ndarray, low_N: np.ndarray, high_N: np.ndarray) -> np.ndarray:
    """Of every bet on N values in [0, 1]: (2, G), above and below; dimensions before N stay before."""
    # A claim beyond 0 or 1 claims nothing on that side, and the bets on it only lose.
    above_N = np.clip(high_N, _LEAST, 1.0)
    below_N = np.clip(low_N, 0.0, 1.0 - _LEAST)
    sides = [
        _log_factors((values_N - above_N) / above_N),
        _log_factors((below_N - values_N) / (1 - below_N)),
    ]
    return np.stack(sides, axis=-2)


def _log_factors(gains_N: np.ndarray) -> np.ndarray:
    factors_G: np.ndarray = np.log1p(gains_N[..., None] * _SHARES_G).sum(axis=-2)
    return factors_G
