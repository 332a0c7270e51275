"""How a step decodes, and what tokens are drawn from."""

import re
from dataclasses import dataclass, field
from enum import StrEnum

from blockroll.errors import InvalidInput

MAX_DRAFTS = 256  # of a plan: no policy accepts blocks of that length, and every step pays for all rows
MAX_ROWS = 4096  # of a plan, for each request in a forward


@dataclass(frozen=True, slots=True)
class Law:
    """The distribution tokens are drawn from: 1.0 is the target, below 1 mixed with the draft, None none."""

    weight: float | None = 1.0

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 <= self.weight <= 1:
            raise InvalidInput(
                f"the weight of a law must be between 0 and 1, got {self.weight}; 1 is the target "
                "(lossless), 0 the draft's own law"
            )

    @property
    def name(self) -> str:
        """`target`, `mixed(weight)` or `none`, as recorded in every rollout."""
        if self.weight is None:
            return "none"
        return "target" if self.weight == 1.0 else f"mixed({self.weight:g})"


MASK_ROWS = "mask_rows"  # the drafter of plans that name none


class PlanKind(StrEnum):
    """Where drafts come about, and where they are verified."""

    PLAIN = "plain"  # there are none
    TWO_FORWARD = "two_forward"  # masks in a forward of their own, before the one that verifies
    FUSED = "fused"  # masks in the forward that verifies, for the next step
    ONE_FORWARD = "one_forward"  # without a forward of the policy; one verifies


@dataclass(frozen=True, slots=True)
class Plan:
    """How the next step decodes; one plan per step for the whole batch.

    (0) is plain, (K) is two-forward with K drafts, (K, levels) is fused with one proposal per level. With
    another drafter than the policy's masks, (K) is one forward that verifies K drafts.
    """

    num_drafts: int
    levels: tuple[int, ...] = ()
    drafter: str = field(default=MASK_ROWS, kw_only=True)  # by its name; of a plain plan it means nothing
    kind: PlanKind = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.num_drafts < 0:
            raise InvalidInput(f"plan needs at least 0 drafts, got {self.num_drafts}; 0 is plain decoding")
        if self.num_drafts > MAX_DRAFTS:
            raise InvalidInput(
                f"plan may draft at most {MAX_DRAFTS} tokens a step, got K = {self.num_drafts}; K is what a "
                "policy was trained to draft, often 4 to 32"
            )
        if self.levels and (
            list(self.levels) != sorted(set(self.levels))
            or self.levels[0] != 0
            or self.levels[-1] > self.num_drafts
        ):
            raise InvalidInput(
                f"plan levels must rise from 0 to at most K = {self.num_drafts}, got "
                f"{list(self.levels)}; without level 0 a step that accepts nothing has no drafts after it"
            )
        if self.levels and self.drafter != MASK_ROWS:
            raise InvalidInput(
                f"levels belong to fused plans, whose drafts are mask rows; a plan of drafter "
                f"{self.drafter!r} has none"
            )
        object.__setattr__(self, "kind", self._kind())
        if self.rows_per_forward > MAX_ROWS:
            raise InvalidInput(
                f"plan may have at most {MAX_ROWS} rows in a forward, got {self.rows_per_forward}: "
                f"{len(self.levels)} proposals of {self.num_drafts} drafts; give fewer levels"
            )

    def _kind(self) -> PlanKind:
        if not self.num_drafts:
            return PlanKind.PLAIN
        if self.drafter != MASK_ROWS:
            return PlanKind.ONE_FORWARD
        return PlanKind.FUSED if self.levels else PlanKind.TWO_FORWARD

    @property
    def name(self) -> str:
        """`plain`, `two_forward(K)`, `fused(K,[levels])`, or a drafter's name as in `history(K)`."""
        match self.kind:
            case PlanKind.PLAIN:
                return "plain"
            case PlanKind.TWO_FORWARD:
                return f"two_forward({self.num_drafts})"
            case PlanKind.FUSED:
                return f"fused({self.num_drafts},[{','.join(map(str, self.levels))}])"
            case PlanKind.ONE_FORWARD:
                return f"{self.drafter}({self.num_drafts})"

    @property
    def forwards_per_step(self) -> int:
        """Request-forwards that one step costs."""
        return 2 if self.kind is PlanKind.TWO_FORWARD else 1

    @property
    def layout(self) -> str | None:
        """What a policy must have been trained to draft for: `two_forward`, `fused`, or None."""
        return self.kind.value if self.kind in (PlanKind.TWO_FORWARD, PlanKind.FUSED) else None

    @property
    def rows_per_forward(self) -> int:
        """New rows of one request in the widest forward of a step."""
        num_blocks = len(self.levels) + 1 if self.kind is PlanKind.FUSED else 1
        return (self.num_drafts + 1) * num_blocks

    @classmethod
    def parse(cls, text: str, *, default_drafts: int) -> "Plan":
        """Read `plain`, `two_forward`, `two_forward(K)`, `fused`, `fused(K)` or `fused(K,[levels])`.

        `fixed:` may stand before it. Without K it is `default_drafts`; without levels they are 0 and K.
        """
        match = _PLAN.fullmatch(text.replace(" ", ""))
        if not match or (match["kind"] == "plain" and match["drafts"]):
            raise InvalidInput(
                "plan must be 'plain', 'two_forward', 'two_forward(K)', 'fused', 'fused(K)' or "
                f"'fused(K,[0,...])', got {text!r}"
            )
        if match["kind"] == "plain":
            return cls(0)
        num_drafts = int(match["drafts"] or default_drafts)
        if num_drafts == 0:
            raise InvalidInput(f"plan {text!r} drafts nothing: give K of at least 1, or 'plain'")
        if match["kind"] == "two_forward":
            if match["levels"]:
                raise InvalidInput(f"plan {text!r} has levels, which only fused plans have")
            return cls(num_drafts)
        levels = match["levels"]
        return cls(num_drafts, tuple(map(int, levels.split(","))) if levels else (0, num_drafts))


_PLAN = re.compile(
    r"(?:fixed:)?(?P<kind>plain|two_forward|fused)(?:\((?P<drafts>\d+)(?:,\[(?P<levels>\d+(?:,\d+)*)\])?\))?"
)
PLAIN = Plan(0)
