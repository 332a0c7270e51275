"""A confidence sequence: bounds on a mean that may be read after every value."""

import math
from collections.abc import Mapping
from typing import Any

from blockroll.errors import CheckpointError, InvalidInput


class ConfidenceSequence:
    """Bounds on a mean in [0, 1] that hold at all times at once, with probability 1 - alpha.

    Of values whose mean given the past moves, it bounds the mean of these means, weighed as below.
    Predictable plug-in empirical Bernstein, Waudby-Smith and Ramdas, Theorem 2, with L = log(2 / alpha):

        m_t = (1/2 + sum y) / (t + 1),      v_t = (1/4 + sum (y_i - m_i)^2) / (t + 1),
        r_t = min(sqrt(2 L / (v_{t-1} t log(1 + t))), 1/2),
        sum r y / sum r  +-  (L + sum (y - m_{t-1})^2 (-log(1 - r) - r)) / sum r
    """

    def __init__(self, alpha: float) -> None:
        if not 0 < alpha < 1:
            raise InvalidInput(f"alpha must be between 0 and 1, got {alpha}; 0.05 is usual")
        self.alpha = alpha
        self.num_values = 0
        self.low, self.high = 0.0, 1.0
        self._total, self._squares = 0.5, 0.25
        self._rates, self._weighted, self._spread = 0.0, 0.0, 0.0

    def add(self, value: float) -> None:
        """One value, in [0, 1]."""
        if not 0 <= value <= 1:
            raise InvalidInput(f"a value must be between 0 and 1, got {value}; scale it by its bounds")
        log_term = math.log(2 / self.alpha)
        before, t = self.num_values, self.num_values + 1
        mean = self._total / (before + 1)
        variance = self._squares / (before + 1)
        rate = min(math.sqrt(2 * log_term / (variance * t * math.log(1 + t))), 0.5)
        self._rates += rate
        self._weighted += rate * value
        self._spread += (value - mean) ** 2 * (-math.log1p(-rate) - rate)
        self.num_values = t
        self._total += value
        self._squares += (value - self._total / (t + 1)) ** 2
        middle, width = self._weighted / self._rates, (log_term + self._spread) / self._rates
        self.low, self.high = max(0.0, middle - width), min(1.0, middle + width)

    @property
    def mean(self) -> float:
        """Of the values so far, each once; NaN without one."""
        return (self._total - 0.5) / self.num_values if self.num_values else math.nan

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` goes on from."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; CheckpointError if that was of another alpha."""
        if state["alpha"] != self.alpha:
            raise CheckpointError(
                f"a confidence sequence of alpha {state['alpha']} goes on as such, got {self.alpha}"
            )
        vars(self).update(state)
