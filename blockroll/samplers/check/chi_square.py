"""The chi-square law and its noncentral form, as far as the checks need them; scipy is no dependency.

A test at significance s rejects above `critical(s, dof)`. If cells are off by relative amounts d with draws
n, the statistic is noncentral with parameter n * sum of p d^2, and `needed_noncentrality` says how much of
it a given power takes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

POWER = 0.99


def survival(statistic: float, dof: int) -> float:
    """P(chi-square with `dof` degrees of freedom > statistic)."""
    return float(_survival(torch.tensor([dof / 2], dtype=torch.float64), statistic)[0])


def critical(significance: float, dof: int) -> float:
    """The statistic that is exceeded with this probability."""
    return _solve(lambda statistic: survival(statistic, dof), significance, start=dof + 1.0)


def noncentral_survival(statistic: float, dof: int, noncentrality: float) -> float:
    """The same for the noncentral law: a Poisson(noncentrality / 2) mixture of dof + 2 j."""
    mean = noncentrality / 2
    if mean == 0:
        return survival(statistic, dof)
    reach = 12 * math.sqrt(mean) + 40
    j = torch.arange(max(0, int(mean - reach)), int(mean + reach), dtype=torch.float64)
    weights = torch.exp(j * math.log(mean) - mean - torch.lgamma(j + 1))
    return float((weights * _survival(dof / 2 + j, statistic)).sum())


def needed_noncentrality(significance: float, dof: int, power: float = POWER) -> float:
    """The noncentrality at which a test of this significance rejects with this power."""
    limit = critical(significance, dof)
    return _solve(lambda value: 1 - noncentral_survival(limit, dof, value), 1 - power, start=dof + 1.0)


def _survival(half_dof: Tensor, statistic: float) -> Tensor:
    upper: Tensor = torch.special.gammaincc(half_dof, torch.full_like(half_dof, statistic / 2))
    return upper


def _solve(falling: Callable[[float], float], goal: float, *, start: float) -> float:
    """Where a falling function of a positive number meets `goal`, to 1e-9 relative."""
    low, high = 0.0, start
    while falling(high) > goal:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > goal else (low, middle)
    return high
