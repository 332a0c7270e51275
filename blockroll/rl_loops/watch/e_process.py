"""Evidence that may be read after every step: an e-process with fresh starts.

Bets (`rollout/calibration/bets.py`) lose a little for as long as a claim is true, and a fault that comes
late would first have to win that back. So new ones are begun again and again: with W_k, the mean wealth of
the bets that begin before step k and are worth 1 until then,

    E_n = sum over k of w_k W_k,n,      w_k = 1 / (k (k + 1)),      sum of all w_k = 1

is an e-process too: under the claim P(there is an n with E_n >= 1 / alpha) <= alpha. Of each bet, with the
product P_n of its factors, W_k,n = P_n / P_k, so the sum of w_k / P_k is all that is kept of earlier starts.

Shapes: S sides that are tested, of 2; G bets of each.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from blockroll.errors import CheckpointError
from blockroll.rollout.calibration.bets import NUM_BETS, Bets

Sides = Literal["above", "below", "both"]
_STARTS_PER_OCTAVE = 64  # new starts get rarer, so that those of a long run still weigh something


class EProcess:
    """Evidence against one claim, over all steps so far. `log_e` is in nats; 0 says nothing."""

    def __init__(self, sides: Sides = "both") -> None:
        """`sides`: where the mean is claimed not to be."""
        self._chosen = {"above": [0], "below": [1], "both": [0, 1]}[sides]
        self.sides = sides
        self.num_values = 0
        self.excess = 0.0
        self.num_steps = 0
        self.log_e = 0.0
        self.log_e_max = 0.0
        self._num_starts = 0
        self._total_2G = np.zeros((2, NUM_BETS))  # log P_n,
        self._starts_2G = np.full((2, NUM_BETS), -np.inf)  # and log of the sum of w_k / P_k

    def add(self, bets: Bets) -> float:
        """Those of one step; gives `log_e`. Infinite wealth stays: what had no probability has happened."""
        if is_start(self.num_steps):
            self._num_starts += 1
            self._starts_2G = with_start(self._starts_2G, self._total_2G, self._num_starts)
        self.num_steps += 1
        self.num_values += bets.num_values
        self.excess += bets.excess
        self._total_2G = self._total_2G + bets.log_wealth_2G
        self.log_e = math.inf if math.isinf(self.log_e_max) else self._log_e()
        self.log_e_max = max(self.log_e_max, self.log_e)
        return self.log_e

    def _log_e(self) -> float:
        total_2G, starts_2G = self._total_2G[self._chosen], self._starts_2G[self._chosen]
        return float(log_e_of(total_2G, starts_2G, self._num_starts))

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` goes on from."""
        return {
            "sides": self.sides,
            "num_values": self.num_values,
            "excess": self.excess,
            "num_steps": self.num_steps,
            "log_e": self.log_e,
            "log_e_max": self.log_e_max,
            "num_starts": self._num_starts,
            "total": self._total_2G.tolist(),
            "starts": self._starts_2G.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; CheckpointError if that was of other sides."""
        if state["sides"] != self.sides:
            raise CheckpointError(f"evidence of sides {state['sides']!r} goes on as such, got {self.sides!r}")
        self.num_values, self.num_steps = int(state["num_values"]), int(state["num_steps"])
        self.excess = float(state["excess"])
        self.log_e, self.log_e_max = float(state["log_e"]), float(state["log_e_max"])
        self._total_2G = np.array(state["total"], dtype=np.float64)
        self._starts_2G = np.array(state["starts"], dtype=np.float64)
        self._num_starts = int(state["num_starts"])


def with_start(starts_SG: np.ndarray, total_SG: np.ndarray, number: int) -> np.ndarray:
    """The sum over starts once bets begin again, for the time of this `number`; logarithms."""
    sums: np.ndarray = np.logaddexp(starts_SG, -math.log(number * (number + 1)) - total_SG)
    return sums


def log_e_of(total_SG: np.ndarray, starts_SG: np.ndarray, num_starts: int) -> np.ndarray:
    """Evidence of the sides S that are tested; dimensions before these stay."""
    num_bets = total_SG.shape[-2] * total_SG.shape[-1]
    terms = (total_SG + starts_SG).reshape(*total_SG.shape[:-2], num_bets) - math.log(num_bets)
    # The starts that are still to come are worth 1 each, and weigh 1 / (number of starts + 1) together.
    log_e: np.ndarray = np.logaddexp(np.logaddexp.reduce(terms, axis=-1), -math.log(num_starts + 1))
    return log_e


def is_start(step: int) -> bool:
    """Whether bets begin before this step, counted from 0: every one at first, then ever fewer an octave."""
    return step % (1 << max(0, step.bit_length() - _STARTS_PER_OCTAVE.bit_length())) == 0
