"""A text that drafts are looked up in, and what a look finds."""

from array import array
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Tokens = array[int]
else:
    Tokens = array  # it takes no parameter before Python 3.12

ORDER = 8  # the longest suffix that is looked up: longer ones find nothing better
PROMPT = 0  # number of the text that a prompt itself is


class Source(IntEnum):
    """Where a place was found."""

    OWN = 0  # the text itself, with its prompt
    SIBLINGS = 1  # texts of its group, running ones as far as they are committed
    EARLIER = 2  # other texts of its prompt
    JOB = 3  # any text that has ended


@dataclass(slots=True)
class Text:
    """A completion as far as it is known, and how much of it has n-grams."""

    group: str | None
    tokens: Tokens = field(default_factory=lambda: array("i"))
    num_learned: int = 0
    number: int = PROMPT  # until it is open
    has_ended: bool = False
    is_in_job: bool = False  # whether the texts of the job have it too


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Places behind the longest suffix that a source has, the latest first: a text and an offset in it."""

    source: Source
    order: int
    places: list[tuple[Tokens, int]]
    own: Tokens | None = None  # of these, the text that is drafted for: it goes on with its drafts
