"""How a step decodes, and what tokens are drawn from."""

import re
from collections.abc import Collection
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


MASK_ROWS = "mask_rows"  # the drafter of plans that draft and name none
HISTORY = "history"  # the drafter that looks drafts up in earlier texts
HISTORY_DRAFTS = 8  # K of a plan of history that says none: a row that is not likely is not drafted
DRAFTERS = (MASK_ROWS, HISTORY)  # that the package has, by the names that plans know them by


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
    another drafter than the policy's masks, (K) is one forward that verifies K drafts. As a string it is its
    name, which `parse` reads.
    """

    num_drafts: int
    levels: tuple[int, ...] = ()
    drafter: str = field(default="", kw_only=True)  # by its name; none given: masks. "" of a plain plan
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
        self._check_drafter()
        if self.num_drafts and not self.drafter:
            object.__setattr__(self, "drafter", MASK_ROWS)
        if self.levels and self.drafter != MASK_ROWS:
            raise InvalidInput(
                "levels belong to fused plans, whose drafts are mask rows; a plan of "
                f"{f'drafter {self.drafter!r}' if self.drafter else '0 drafts'} has none"
            )
        object.__setattr__(self, "kind", self._kind())
        if self.rows_per_forward > MAX_ROWS:
            raise InvalidInput(
                f"plan may have at most {MAX_ROWS} rows in a forward, got {self.rows_per_forward}: "
                f"{len(self.levels)} proposals of {self.num_drafts} drafts; give fewer levels"
            )

    def _check_drafter(self) -> None:
        if not self.drafter:
            return
        if not self.num_drafts:
            raise InvalidInput(
                f"a plan of 0 drafts has no drafter, got {self.drafter!r}; leave it out, or give K of at "
                "least 1"
            )
        if not _DRAFTER.fullmatch(self.drafter) or self.drafter in _KINDS:
            raise InvalidInput(
                f"a drafter's name is letters, digits and underscores, and none of {', '.join(_KINDS)}, got "
                f"{self.drafter!r}: plans are read by it"
            )

    def __str__(self) -> str:
        return self.name

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
    def settles_first(self) -> bool:
        """Whether the first position is settled before the others are verified, with coins of its own."""
        return self.kind is PlanKind.TWO_FORWARD

    @property
    def forwards_per_step(self) -> int:
        """Request-forwards that one step costs."""
        return 2 if self.kind is PlanKind.TWO_FORWARD else 1

    @property
    def least_committed(self) -> int:
        """Tokens of each request that a step commits at least."""
        return 2 if self.settles_first else 1

    @property
    def most_committed(self) -> int:
        """Tokens of each request that a step commits at most."""
        return self.num_drafts + 1

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
    def parse(cls, text: str, *, default_drafts: int, drafters: Collection[str] | None = DRAFTERS) -> "Plan":
        """Read `plain`, `two_forward`, `two_forward(K)`, `fused`, `fused(K)`, `fused(K,[levels])`, `name(K)`.

        `name` is one of `drafters`; None: any, with its K. `fixed:` may stand before it all. Without K it is
        `default_drafts`, of history 8; without levels they are 0 and K. InvalidInput for everything else.
        """
        match = _PLAN.fullmatch(text.replace(" ", ""))
        name = match["name"] if match else ""
        if match is None or not _is_known(match, drafters) or (name == "plain" and match["drafts"]):
            others = [f", '{each}(K)'" for each in drafters or ("drafter",) if each != MASK_ROWS]
            raise InvalidInput(
                "plan must be 'plain', 'two_forward', 'two_forward(K)', 'fused', 'fused(K)'"
                f"{''.join(others)} or 'fused(K,[0,...])', got {text!r}"
            )
        if name == "plain":
            return cls(0)
        default_drafts = HISTORY_DRAFTS if name == HISTORY else default_drafts
        num_drafts, levels = int(match["drafts"] or default_drafts), match["levels"]
        if num_drafts == 0:
            raise InvalidInput(f"plan {text!r} drafts nothing: give K of at least 1, or 'plain'")
        if name == "fused":
            return cls(num_drafts, tuple(map(int, levels.split(","))) if levels else (0, num_drafts))
        if levels:
            raise InvalidInput(f"plan {text!r} has levels, which only fused plans have")
        return cls(num_drafts, drafter="" if name == "two_forward" else name)


_KINDS = ("plain", "two_forward", "fused", "auto")  # what the text of a plan may begin with
_DRAFTER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAN = re.compile(
    rf"(?:fixed:)?(?P<name>{_DRAFTER.pattern})(?:\((?P<drafts>\d+)(?:,\[(?P<levels>\d+(?:,\d+)*)\])?\))?"
)


def _is_known(match: re.Match[str], drafters: Collection[str] | None) -> bool:
    """Whether a plan is called so; mask rows are asked for by `two_forward` or `fused`."""
    name = match["name"]
    if name in ("plain", "two_forward", "fused"):
        return True
    return name not in (*_KINDS, MASK_ROWS) and (
        match["drafts"] is not None if drafters is None else name in drafters
    )


PLAIN = Plan(0)
