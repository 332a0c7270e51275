"""Coins: that none serves twice, and that the one a token is redrawn by does not know why it was needed."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from blockroll.errors import InvalidInput
from blockroll.samplers.check.chi_square import POWER, survival
from blockroll.samplers.check.draws import SIGNIFICANCE
from blockroll.samplers.check.finding import Finding
from blockroll.samplers.check.laws import as_law


class Coin(NamedTuple):
    """One uniform, and the use it was put to."""

    request: str
    position: int
    purpose: str  # "draft", "accept", "final", ...
    attempt: int  # which try at this position: the forwards the request has run
    value: float


def check_coins(
    coins: Iterable[Coin],
    *,
    bits: int = 52,
    significance: float = SIGNIFICANCE,
    name: str = "every coin serves once",
) -> Finding:
    """Whether a value decides twice: for two uses, or twice for one.

    Values are compared as they are, or in their first `bits` bits if they are known to that many only; some
    then meet by chance, and the threshold is the number of pairs that chance exceeds with this probability.
    Blind to coins that are reused under a change of value, such as 1 - u. Raises InvalidInput without
    coins.
    """
    uses = defaultdict(list)
    for coin in coins:
        uses[math.floor(coin.value * 2.0**bits) if bits < 52 else coin.value].append(coin)
    count = sum(map(len, uses.values()))
    if not count:
        raise InvalidInput("no coins were recorded; record every uniform with its use")
    repeated = [same for same in uses.values() if len(same) > 1]
    pairs = sum(len(same) * (len(same) - 1) // 2 for same in repeated)
    limit = equal_coins_limit(count, bits=bits, significance=significance)
    found = f"{count} coins, {pairs} pairs with the same value"
    if pairs > limit:
        first, second = repeated[0][:2]
        found += f", such as {_use(first)} and {_use(second)} with {first.value:.17g}"
    return Finding(
        check=name,
        measure="pairs of equal coins",
        statistic=float(pairs),
        threshold=float(limit),
        found=found,
    )


def equal_coins_limit(count: int, *, bits: int = 52, significance: float = SIGNIFICANCE) -> int:
    """The most pairs of equal values among this many coins that chance explains.

    Independent coins of so many bits make count (count - 1) / 2 pairs, each equal with probability 2^-bits;
    their number is Poisson, and exceeds this with at most this probability.
    """
    return _poisson_limit(count * (count - 1) / 2 * 2.0**-bits, significance)


def check_redraw_uniforms(
    uniforms_N: Tensor,
    *,
    significance: float = SIGNIFICANCE,
    name: str = "redraw uniforms, given a rejection",
) -> Finding:
    """Whether the uniforms that redraw a token are uniform on (0, 1) given that its draft was rejected.

    A coin that rejected is large; one that serves again as the redraw's threshold shows here.
    Kolmogorov-Smirnov, with the bound of Dvoretzky, Kiefer, Wolfowitz and Massart, so that significance and
    power hold for every n: the size stated is a distance of distribution functions. A value outside (0, 1),
    or a NaN, does not pass. Raises InvalidInput for fewer than 20 uniforms.
    """
    values = np.sort(uniforms_N.to(torch.float64).flatten().numpy())
    count = len(values)
    if count < 20:
        raise InvalidInput(f"at least 20 redraws are needed, got {count}; let more drafts be rejected")
    edges = np.arange(count + 1) / count
    distance = float(np.maximum(edges[1:] - values, values - edges[:-1]).max())
    outside = int((~((values > 0) & (values < 1))).sum())
    limit = _ks_bound(significance, count)
    found = f"{count} redraws are at most {distance:.3g} from uniform"
    if outside:
        found = f"{outside} of {count} redraws have no uniform: the residual does not hold their token"
    return Finding(
        check=name,
        measure="Kolmogorov-Smirnov distance",
        statistic=math.inf if outside else distance,
        threshold=limit,
        found=found,
        detectable=limit + _ks_bound(1 - POWER, count),
        power=POWER,
    )


def redraw_uniforms(token_ids_N: Tensor, target_NV: Tensor, draft_NV: Tensor, *, seed: int = 0) -> Tensor:
    """The uniforms that redrew these tokens after a rejection, float64 (N,), where the sampler kept them.

    Known from token and laws up to the token's own interval of the residual max(target - draft, 0), in the
    order of ids; the place inside it is filled in at random, which leaves a uniform uniform. NaN where the
    residual does not hold the token, which no right redraw does.
    """
    weights_NV = np.maximum(as_law(target_NV, "the target") - as_law(draft_NV, "the draft law"), 0)
    rows = np.arange(len(weights_NV))
    own_N = weights_NV[rows, token_ids_N.numpy()]
    below_N = weights_NV.cumsum(axis=1)[rows, token_ids_N.numpy()] - own_N
    shares_N = torch.rand(
        len(rows), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).numpy()
    total_N = weights_NV.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return torch.from_numpy(np.where(own_N > 0, (below_N + shares_N * own_N) / total_N, np.nan))


def _ks_bound(probability: float, count: int) -> float:
    """P(distance > bound) is at most this probability: 2 exp(-2 n bound^2)."""
    return math.sqrt(math.log(2 / probability) / (2 * count))


def _poisson_limit(mean: float, significance: float) -> int:
    """The smallest count that a Poisson variable exceeds with at most this probability."""
    limit = max(0, int(mean) - 1)
    # P(Poisson(m) <= k) is P(chi-square with 2 (k + 1) degrees of freedom > 2 m).
    while 1 - survival(2 * mean, 2 * (limit + 1)) > significance:
        limit += 1
    return limit


def _use(coin: Coin) -> str:
    return f"({coin.request}, position {coin.position}, {coin.purpose}, attempt {coin.attempt})"
