"""The law of one committed token in closed form, from a sampler's own numbers, at real vocabularies.

    law(x) = q(x) a(x) + (1 - sum of q a) r(x)

with q the law drafts are drawn by, a the probability that a draft is accepted, min(1, p / q) if all is
well, and r the law of the token that replaces a rejected one. No draws, no grid: what is left is the
sampler's arithmetic. Source: Leviathan et al. 2023, appendix A.1.

Shapes: V vocabulary; a draft step has K = V drafts of one row each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blockroll.errors import InvalidInput
from blockroll.kernels.draft_draw import draft_probs
from blockroll.kernels.rows import target_probs
from blockroll.samplers.check.finding import Finding
from blockroll.samplers.check.laws import softmax
from blockroll.samplers.check.tables import Sampler
from blockroll.samplers.check.watch import Watch
from blockroll.types import Draft

TOLERANCE = 1e-5
_BLOCKS_AT_ONCE = 16  # of a row that is searched in two levels, and drawn from again for each


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """A sampler's own numbers for one position; each of shape (V,) and whatever dtype it computes in."""

    draft_cumulative_V: Tensor  # the cumulative sums drafts are drawn by, not necessarily up to 1
    accept_V: Tensor  # the probability to accept id x, if it was drafted
    final_cumulative_V: Tensor  # the cumulative sums the token after a rejection is drawn by


def check_closed_form(
    arithmetic: Arithmetic,
    target_logits_V: Tensor,
    *,
    temperature: float = 1.0,
    tolerance: float = TOLERANCE,
    name: str = "closed form",
) -> Finding:
    """Total variation between the committed token and the float64 softmax of the target's logits.

    Raises InvalidInput if the shapes differ or the temperature is not above 0.
    """
    size = len(target_logits_V)
    parts = (arithmetic.draft_cumulative_V, arithmetic.accept_V, arithmetic.final_cumulative_V)
    if any(part.shape != (size,) for part in parts):
        raise InvalidInput(
            f"every array of the arithmetic must be ({size},) as the target logits are, got "
            f"{[tuple(part.shape) for part in parts]}"
        )
    draft_V, accept_V, final_V = _law(parts[0]), parts[1].to(torch.float64).numpy(), _law(parts[2])
    kept_V = draft_V * accept_V
    law_V = kept_V + (1 - kept_V.sum()) * final_V
    distance = float(np.abs(law_V - softmax(target_logits_V, temperature)).sum() / 2)
    return Finding(
        check=f"{name}, V = {size}",
        measure="total variation",
        statistic=distance,
        threshold=tolerance,
        found=f"the token is {distance:.2g} from the target, and {kept_V.sum():.3g} of drafts are accepted",
    )


def arithmetic_of(
    sampler: Sampler, draft_logits_V: Tensor, target_logits_V: Tensor, *, temperature: float = 1.0
) -> Arithmetic:
    """What a torch sampler itself sums and compares, seen while it runs.

    Drafts of every id are verified at once, V positions of the same row, each with a coin of 1: a sampler
    that decides by u q < p, by u < p / q or with <= then holds a(x) = right / left. Drafts may be drawn in
    two searches, of sums of blocks and then of one block: every block is then drawn from. A sampler that
    decides or draws otherwise, and so shows neither such a comparison nor cumulative sums, raises
    InvalidInput: fill in an `Arithmetic` by hand.
    """
    size = len(target_logits_V)
    temperature_1 = torch.tensor([temperature], dtype=torch.float64)
    half = torch.tensor([[0.5]], dtype=torch.float64)
    with Watch() as drafting:
        drawn = sampler.draw_draft(draft_logits_V[None, None], temperature_1, half)
    drawn_11V = draft_probs(drawn, size)
    drafted = _of_size(drafting.cumulative, size)
    if not drafted:
        drafted = _by_blocks(sampler, draft_logits_V, temperature_1, drafting.cumulative)
    target_11V = target_probs(target_logits_V[None, None], temperature_1)
    draft = Draft(
        token_ids_BK=torch.arange(size)[None],
        law=drawn_11V.expand(1, size, -1),
        num_drafts_B=torch.tensor([size]),
    )
    with Watch() as accepting:
        sampler.verify_block(draft, target_11V.expand(1, size + 1, -1), half.new_ones(1, size + 1))
    sides = [(left, right) for left, right in accepting.compared if left.numel() == right.numel() == size]
    one = Draft(
        token_ids_BK=(target_11V - drawn_11V).argmin(dim=-1),  # surely rejected by a coin of 1
        law=drawn_11V,
        num_drafts_B=torch.tensor([1]),
    )
    with Watch() as rejecting:
        sampler.verify_block(one, target_11V.expand(1, 2, -1), half.new_tensor([[1.0, 0.5]]))
    replaced = _of_size(rejecting.cumulative, size)
    if not sides or not drafted or not replaced:
        raise InvalidInput(
            "this sampler neither compares its coins by < nor draws by searchsorted or multinomial, so its "
            "arithmetic can't be seen; fill in an Arithmetic by hand"
        )
    left_V, right_V = (side.reshape(size) for side in sides[0])
    accept_V = torch.where(right_V >= left_V, 1.0, right_V / left_V)
    return Arithmetic(
        draft_cumulative_V=drafted[0].reshape(size),
        accept_V=accept_V,
        final_cumulative_V=replaced[0].reshape(size),
    )


def _of_size(seen: Sequence[Tensor], size: int) -> list[Tensor]:
    return [sums_V for sums_V in seen if sums_V.numel() == size]


def _by_blocks(
    sampler: Sampler, logits_V: Tensor, temperature_1: Tensor, seen: Sequence[Tensor]
) -> list[Tensor]:
    """The cumulative sums of a row that is searched by blocks, block by block; none where it is not."""
    size, searched = len(logits_V), _unlike(seen)
    if len(searched) != 2:
        return []
    blocks_C, width = searched[0].flatten(), searched[1].numel()
    num_blocks = len(blocks_C)
    if not (num_blocks - 1) * width < size <= num_blocks * width:
        return []
    low_C = torch.cat([blocks_C.new_zeros(1), blocks_C[:-1]])
    inside_CW = blocks_C.new_zeros(num_blocks, width)
    reached = (blocks_C > low_C).nonzero().flatten()  # none is drawn from a block without weight
    for some in torch.split(reached, _BLOCKS_AT_ONCE):
        uniforms = (low_C[some] + blocks_C[some]) / 2 / blocks_C[-1]
        logits = logits_V.expand(len(some), 1, -1)
        with Watch() as drawing:
            sampler.draw_draft(logits, temperature_1.expand(len(some)), uniforms[:, None].double())
        inside = _unlike(drawing.cumulative)[1::2]  # behind the blocks of the same rows
        inside_CW[some] = torch.cat([sums.reshape(-1, width) for sums in inside])
    return [(low_C[:, None] + inside_CW).flatten()[:size]]


def _law(cumulative_V: Tensor) -> np.ndarray:
    """The intervals between cumulative sums, as shares of the last one, in float64."""
    sums = cumulative_V.to(torch.float64).numpy()
    return np.asarray(np.diff(sums, prepend=0.0) / sums[-1])


def _unlike(seen: Sequence[Tensor]) -> list[Tensor]:
    """Each once: a search may look twice into the same sums."""
    return list({id(sums): sums for sums in seen}.values())
