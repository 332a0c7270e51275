"""What a check hands back: one figure, the limit it is held against, and one plain sentence."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The verdict of one check. It passes if its figure is a number and at most the limit."""

    check: str  # what was checked, and of what
    measure: str  # what the statistic is: "total variation", "chi-square with 9 degrees of freedom", ...
    statistic: float  # infinity if something impossible was seen
    threshold: float
    found: str  # one plain sentence
    # The smallest deviation that is seen with probability `power`, as the check's docstring defines it; None:
    # the statistic is the deviation itself.
    detectable: float | None = None
    power: float | None = None

    @property
    def passed(self) -> bool:
        """A NaN does not pass."""
        return self.statistic <= self.threshold

    def __str__(self) -> str:
        verdict = "pass" if self.passed else "FAIL"
        figures = f"{self.measure} {self.statistic:.3g}, at most {self.threshold:.3g}"
        if self.detectable is not None:
            figures += f"; {self.detectable:.2g} would be seen with power {self.power:g}"
        return f"{verdict}  {self.check}: {self.found} [{figures}]"

    def row(self) -> dict[str, Any]:
        """As a flat row for a file of results."""
        return {**asdict(self), "passed": self.passed}
