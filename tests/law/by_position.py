"""The law of texts drawn by the coins of their positions, exact through whole engine runs, on tables.

Coin p, given the tokens before it, draws the token of position p. So each text has one cell of coins, whose
volume is the text's probability, and an engine must commit just that text in it: in its low corner and in its
high one. What was drafted, by whom and how often has no say.

Shapes: T texts, P positions.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch

from blockroll.rollout.engine import step as decoding
from blockroll.types import Law, Request, Sampling
from tests.law.engine_cells import PROMPT
from tests.law.integrate import Tokens, Toy, target_law

_MARGIN = 1e-11
_IDLE = 0.5  # behind the last position


class Cells(NamedTuple):
    """The cell of every text that the target may write."""

    texts: list[Tokens]
    volumes: list[float]
    coins_TP: torch.Tensor


def cells_of(toy: Toy, length: int, corner: str) -> Cells:
    """Texts of this length, and a point beside the lowest or the highest corner of each cell."""
    law = {text: mass for text, mass in target_law(toy, length).items() if mass > 0}
    coins = []
    for text in law:
        point = []
        for index, token in enumerate(text):
            row_V = toy.target_V(text[:index])
            low, high = row_V[:token].sum(), row_V[: token + 1].sum()
            point.append(low + _MARGIN if corner == "low" else high - _MARGIN)
        coins.append(point)
    return Cells(list(law), list(law.values()), torch.tensor(coins, dtype=torch.float64))


@contextmanager
def coins_given(coins_TP: torch.Tensor) -> Iterator[None]:
    """Requests of seed t meet the coins of text t; no other coin is asked for."""
    padding = torch.full((len(coins_TP), 32), _IDLE, dtype=torch.float64)
    table = torch.cat([coins_TP, padding], dim=1)

    def given(seeds_B, positions_B, attempts_B, num_drafts, *, settles, by_position):
        assert by_position is True
        offsets = [*range(num_drafts + 1), *[0] * settles]
        verify = table[seeds_B[:, None], positions_B[:, None] - 1 + torch.tensor(offsets)]
        return torch.full((len(seeds_B), num_drafts), _IDLE, dtype=torch.float64), verify

    with mock.patch.object(decoding, "step_uniforms", given):
        yield


def requests_of(toy: Toy, length: int, count: int, *, weight: float = 1.0, **options) -> list[Request]:
    """One for each text, all siblings."""
    sampling = Sampling(
        temperature=toy.temperature, draft_temperature=0, max_tokens=length, law=Law(weight), **options
    )
    return [
        Request(request_id=str(t), prompt_ids=(PROMPT,), seed=t, sampling=sampling, group_id="all")
        for t in range(count)
    ]


def law_by_position(
    toy: Toy,
    run: Callable[[list[Request]], dict[str, Tokens]],
    *,
    length: int,
    weight: float = 1.0,
    corner: str = "low",
) -> dict[Tokens, float]:
    """The law of what `run` commits for these requests, texts by request id, summed over all coins."""
    cells = cells_of(toy, length, corner)
    with coins_given(cells.coins_TP):
        texts = run(requests_of(toy, length, len(cells.texts), weight=weight))
    law: dict[Tokens, float] = defaultdict(float)
    for t, volume in enumerate(cells.volumes):
        law[tuple(texts[str(t)])] += volume
    return dict(law)
