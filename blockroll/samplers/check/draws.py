"""Draws of a black box against the law it claims: chi-square, with the deviation it would have seen.

The stated size is a total variation: that of a law whose cells are all off by one relative amount, half of
them up and half down, which n draws show with power 0.99 at the given significance. A deviation spread over
cells that were pooled, or below that size, can pass.

Shapes: N draws, V vocabulary, C cells.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from blockroll.errors import InvalidInput
from blockroll.kernels.rows import as_rows
from blockroll.samplers.check.chi_square import POWER, critical, needed_noncentrality, survival
from blockroll.samplers.check.finding import Finding
from blockroll.samplers.check.laws import as_law
from blockroll.types import Draft, PointMass

SIGNIFICANCE = 1e-3
FEWEST = 20  # expected draws of a cell; cells that expect fewer are one cell
_BINS = 32


def check_draws(
    draws: Iterable[Hashable] | Tensor,
    law: Mapping[Hashable, float] | Tensor | np.ndarray,
    *,
    significance: float = SIGNIFICANCE,
    fewest: int = FEWEST,
    name: str = "draws",
) -> Finding:
    """Independent draws against the probabilities they are said to have.

    Draws are ids and the law is (V,), or draws are any hashable outcomes, texts say, and the law maps them
    to their probabilities. A draw that the law gives no probability does not pass. Raises InvalidInput if
    the law is none, or if fewer than two cells can expect `fewest` draws.
    """
    if not isinstance(law, Mapping):
        law = dict(enumerate(as_law(law).tolist()))
    as_law(np.array(list(law.values())))
    counts = Counter(draws.flatten().tolist() if isinstance(draws, Tensor) else draws)
    impossible = sum(count for outcome, count in counts.items() if not law.get(outcome, 0.0) > 0)
    possible = [outcome for outcome, probability in law.items() if probability > 0]
    count_C = np.array([counts[outcome] for outcome in possible], dtype=np.float64)
    law_C = np.array([law[outcome] for outcome in possible])
    return _against(count_C, law_C / law_C.sum(), impossible, significance, fewest, name)


def check_same_law(
    left: Iterable[Hashable],
    right: Iterable[Hashable],
    *,
    significance: float = SIGNIFICANCE,
    fewest: int = FEWEST,
    name: str = "two samples",
) -> Finding:
    """Two samples of one unknown law, where it can't be written down: plain decoding is the other sample.

    Outcomes seen fewer than `fewest` times in both together are one cell. Raises InvalidInput without two
    cells.
    """
    counts = [Counter(left), Counter(right)]
    both = counts[0] + counts[1]
    table_2C = np.array(
        [[each[key] for key, total in both.items() if total >= fewest] for each in counts], float
    )
    rare_2 = [[sum(each[key] for key, total in both.items() if total < fewest)] for each in counts]
    if sum(map(sum, rare_2)) >= fewest:
        table_2C = np.concatenate([table_2C, rare_2], axis=1)
    _refuse_cells(table_2C.shape[1], len(list(both.elements())))
    size_21 = table_2C.sum(axis=1, keepdims=True)
    if not size_21.all():
        raise InvalidInput(f"both samples need draws, got {size_21.flatten().astype(int).tolist()}")
    expected_2C = size_21 * table_2C.sum(axis=0) / table_2C.sum()
    statistic = float(((table_2C - expected_2C) ** 2 / expected_2C).sum())
    # Two laws off by a share s of each cell have noncentrality s^2 n m / (n + m), and total variation s / 2.
    draws = float(size_21.prod() / size_21.sum())
    return _finding(name, statistic, table_2C.shape[1] - 1, draws, significance, "the two samples")


def check_tokens(
    token_ids_N: Tensor,
    laws_NV: Tensor,
    *,
    towards_NV: Tensor | None = None,
    significance: float = SIGNIFICANCE,
    seed: int = 0,
    name: str = "tokens",
) -> Finding:
    """Tokens that each come with a law of their own, as those of one long text do.

    A token's place in its law is (mass of the ids before it) + v (its own mass), v uniform: uniform on (0,
    1) and independent of all earlier ones, if each token was drawn from its law given the past (Rosenblatt
    1952). Places are counted in 32 equal bins. Ids are ordered from the most likely down, so that a greedy
    draw, a truncated one and a wrong temperature each pile up; or, given `towards_NV`, by how much that law
    would rather have them, which shows a lean towards it best. The size stated is the total variation of
    places, at most that of tokens. Raises InvalidInput if laws and tokens do not fit, or for fewer than 40
    tokens.
    """
    laws = as_law(laws_NV)
    if laws.shape[:1] != tuple(token_ids_N.shape) or laws.ndim != 2:
        raise InvalidInput(
            f"tokens (N,) need laws (N, V), got {tuple(token_ids_N.shape)} and {tuple(laws_NV.shape)}"
        )
    place_N, is_possible_N = places(token_ids_N, laws, towards_NV, seed=seed)
    num_bins = min(_BINS, len(place_N) // FEWEST)
    _refuse_cells(num_bins, len(place_N))
    bin_N = (place_N[is_possible_N] * num_bins).astype(np.int64).clip(0, num_bins - 1)
    return _against(
        np.bincount(bin_N, minlength=num_bins).astype(float),
        np.full(num_bins, 1 / num_bins),
        int((~is_possible_N).sum()),
        significance,
        0,
        name,
    )


def check_draft_law(
    drafter: Callable[[int], Draft],
    num_calls: int,
    *,
    significance: float = SIGNIFICANCE,
    seed: int = 0,
    name: str = "returned draft law",
) -> Finding:
    """Whether the law a drafter returns is the one its tokens were drawn from, by `check_tokens`.

    `drafter(call)` drafts once, by its own randomness, after whatever prefix it likes; every draft of every
    call counts. A drafter that takes its uniforms can be checked exactly instead: `check_stratified` on its
    tokens, against the law it returns. Raises InvalidInput without a draft in
    any call, for a draft that claims point masses, and as `check_tokens` does.
    """
    tokens, laws = [], []
    for call in range(num_calls):
        draft = drafter(call)
        is_drafted_BK = torch.arange(draft.token_ids_BK.shape[1]) < draft.num_drafts_B[:, None]
        tokens.append(draft.token_ids_BK[is_drafted_BK])
        if isinstance(draft.law, PointMass):
            raise InvalidInput(
                "the drafter returned POINT_MASS: a token cannot contradict a law of that token alone; check "
                "instead that one prefix always has the same drafts"
            )
        laws.append(as_rows(draft.law).dense()[is_drafted_BK])
    if not sum(map(len, tokens)):
        raise InvalidInput(f"the drafter drafted nothing in {num_calls} calls; its law can't be checked")
    return check_tokens(torch.cat(tokens), torch.cat(laws), significance=significance, seed=seed, name=name)


def places(
    token_ids_N: Tensor, laws_NV: np.ndarray, towards_NV: Tensor | None = None, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Of each token in its law: the place (N,), float64, and whether it has any probability there (N,)."""
    key_NV = laws_NV
    if towards_NV is not None:
        towards = as_law(towards_NV, "the law leant towards")
        with np.errstate(divide="ignore", invalid="ignore"):
            key_NV = np.where(laws_NV > 0, towards / laws_NV, -1.0)
    order_NV = np.argsort(-key_NV, axis=1, kind="stable")
    sorted_NV = np.take_along_axis(laws_NV, order_NV, axis=1)
    rank_N1 = (order_NV == token_ids_N.numpy()[:, None]).argmax(axis=1)[:, None]
    own_N = np.take_along_axis(sorted_NV, rank_N1, axis=1)[:, 0]
    before_N = np.take_along_axis(sorted_NV.cumsum(axis=1), rank_N1, axis=1)[:, 0] - own_N
    shares_N = torch.rand(
        len(own_N), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).numpy()
    return (before_N + shares_N * own_N) / laws_NV.sum(axis=1), own_N > 0


def _against(
    count_C: np.ndarray, law_C: np.ndarray, impossible: int, significance: float, fewest: int, name: str
) -> Finding:
    """One sample against a law of the cells; rare cells become one, or part of the rarest other."""
    draws = count_C.sum() + impossible
    is_rare_C = law_C * draws < fewest
    counts, laws = count_C[~is_rare_C].tolist(), law_C[~is_rare_C].tolist()
    if is_rare_C.any():
        rest = (count_C[is_rare_C].sum(), law_C[is_rare_C].sum())
        if rest[1] * draws >= fewest or not counts:
            counts, laws = [*counts, rest[0]], [*laws, rest[1]]
        else:
            rarest = int(np.argmin(laws))
            counts[rarest], laws[rarest] = counts[rarest] + rest[0], laws[rarest] + rest[1]
    _refuse_cells(len(counts), int(draws))
    expected = np.array(laws) * draws
    statistic = float(((np.array(counts) - expected) ** 2 / expected).sum())
    if impossible:
        statistic = math.inf
    subject = (
        f"{impossible} of {int(draws)} draws have no probability;" if impossible else f"{int(draws)} draws"
    )
    return _finding(name, statistic, len(counts) - 1, float(draws), significance, subject)


def _finding(
    name: str, statistic: float, dof: int, draws: float, significance: float, subject: str
) -> Finding:
    """Cells off by a share s of themselves have noncentrality n s^2, and total variation s / 2."""
    limit = critical(significance, dof)
    verb = "agree with" if statistic <= limit else "contradict"
    p_value = 0.0 if math.isinf(statistic) else survival(statistic, dof)
    return Finding(
        check=name,
        measure=f"chi-square with {dof} degrees of freedom",
        statistic=statistic,
        threshold=limit,
        found=f"{subject} {verb} one law, p-value {p_value:.2g}",
        detectable=math.sqrt(needed_noncentrality(significance, dof) / draws) / 2,
        power=POWER,
    )


def _refuse_cells(num_cells: int, draws: int) -> None:
    if num_cells < 2:
        raise InvalidInput(
            f"{draws} draws fill fewer than two cells of enough draws each; draw more, or from a flatter law"
        )
