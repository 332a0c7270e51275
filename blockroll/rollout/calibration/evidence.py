"""What a replica has seen of its own tokens, as sums that may be added: bets, and means of figures."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from blockroll.rollout.calibration.bets import Bets


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """By name: bets of each functional, and the sum and the count of each figure."""

    bets: Mapping[str, Bets] = field(default_factory=dict)
    sums: Mapping[str, tuple[float, int]] = field(default_factory=dict)

    def __add__(self, other: "Evidence") -> "Evidence":
        bets, sums = dict(self.bets), dict(self.sums)
        for name, each in other.bets.items():
            bets[name] = bets.get(name, Bets.none()) + each
        for name, (total, count) in other.sums.items():
            mine = sums.get(name, (0.0, 0))
            sums[name] = (mine[0] + total, mine[1] + count)
        return Evidence(bets, sums)
