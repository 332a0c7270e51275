"""Cells of the coins of one engine step, worked out for the test from the tables, in numpy.

Shapes: C cells, K drafted tokens, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from blockroll.types import Plan
from tests.law.integrate import Tokens, Toy, _boundaries, _product, _split, tempered

PROMPT = 0  # every request starts from this one token; histories below leave it out


class State(NamedTuple):
    """Where a request stands between two steps, and the draft rows it will meet, as keys of the table."""

    history: Tokens
    drafts: tuple[tuple[Tokens, int], ...]


@dataclass(frozen=True, kw_only=True)
class Processing:
    """Options of `Sampling`, and what they make of a row of weights: written for the test, in numpy."""

    options: dict = field(default_factory=dict)
    excluded: Callable[[Tokens], set[int]] = lambda completion: set()  # what must not follow

    def target_V(self, weights_V, completion: Tokens, temperature: float) -> np.ndarray:
        """The law of the token behind `completion`."""
        return self._law(weights_V, completion, self.excluded(completion), temperature)

    def draft_V(self, weights_V, completion: Tokens, drafted: Tokens, temperature: float) -> np.ndarray:
        """The law of the draft behind `drafted`: penalties go by the completion, masks by the drafts too."""
        excluded = self.excluded(completion + drafted)
        if len(excluded) == len(weights_V):
            excluded = set()
        return self._law(weights_V, completion, excluded, temperature)

    def _law(self, weights_V, completion: Tokens, excluded: set[int], temperature: float) -> np.ndarray:
        get = self.options.get
        logits = [math.log(weight) for weight in weights_V]
        for token in range(len(logits)):
            logits[token] += get("logit_bias", {}).get(token, 0.0)
            if token in (PROMPT, *completion):
                penalty = get("repetition_penalty", 1.0)
                logits[token] *= penalty if logits[token] < 0 else 1 / penalty
            logits[token] -= get("frequency_penalty", 0.0) * completion.count(token)
            logits[token] -= get("presence_penalty", 0.0) * (token in completion)
            if token in excluded:
                logits[token] = -math.inf
        law = tempered(np.exp(logits), temperature)
        order = sorted(range(len(law)), key=lambda token: (-law[token], token))
        kept = order[: get("top_k", 0) or None]
        mass, nucleus = 0.0, []
        for token in kept:
            if mass < get("top_p", 1.0) * sum(law[kept]):
                nucleus.append(token)
            mass += law[token]
        nucleus = [token for token in nucleus if law[token] >= get("min_p", 0.0) * law[order[0]]]
        law = np.array([p if token in nucleus else 0.0 for token, p in enumerate(law)])
        return law / law.sum()


def _laws(
    toy: Toy, state: State, drafted: Tokens, weight: float, processing: Processing
) -> tuple[list, list]:
    """Draft laws (one per draft), and the laws that are committed by (one more)."""
    drafts = [
        processing.draft_V(toy.draft_weights(*key), state.history, drafted[:i], toy.draft_temperature)
        for i, key in enumerate(state.drafts)
    ]
    targets = []
    for i in range(len(drafts) + 1):
        prefix = state.history + drafted[:i]
        row = np.asarray(toy.target_weights(prefix), dtype=np.float64)
        if i < len(drafts):
            row = row**weight * np.asarray(toy.draft_weights(*state.drafts[i]), dtype=np.float64) ** (
                1 - weight
            )
        targets.append(processing.target_V(row, prefix, toy.temperature))
    return drafts, targets


def step_cells(
    toy: Toy, plan: Plan, state: State, weight: float, processing: Processing
) -> tuple[np.ndarray, np.ndarray]:
    """Points (C, 2K + 1), draft uniforms, accept coins, final uniform; and volumes (C,).

    A two-forward step settles its first position by one more coin, and verifies the others behind the token
    that then stands there. Of point masses every coin draws the token of its position.
    """
    settles = bool(plan.num_drafts and not plan.levels)
    if toy.draft_temperature == 0:
        return _certain_cells(toy, plan, state, weight, processing, settles=settles)
    if settles:
        return _settled_cells(toy, state, weight, processing)
    num_drafts, unused = len(state.drafts), plan.num_drafts - len(state.drafts)
    points, volumes = [], []
    for drafted in np.ndindex(*[toy.vocab_size] * num_drafts):
        draft_laws, targets = _laws(toy, state, drafted, weight, processing)
        if any(law_V[token] == 0 for token, law_V in zip(drafted, draft_laws, strict=True)):
            continue
        pairs = list(zip(targets, draft_laws, strict=False))
        rows = [*targets, *(np.maximum(target - draft, 0) for target, draft in pairs)]
        final_T = np.concatenate([_boundaries(row) for row in rows])
        draws = [
            _split(_boundaries(law_V), "low", within=law_V[:token].sum() + law_V[token] / 2)
            for token, law_V in zip(drafted, draft_laws, strict=True)
        ]
        coins = [
            _split(np.minimum(1, target[token] / draft[token])[None], "low")
            for token, (target, draft) in zip(drafted, pairs, strict=True)
        ]
        idle = [(np.array([0.5]), np.array([1.0]))] * unused
        intervals = [*draws, *idle, *coins, *idle, _split(final_T, "low")]
        points.append(_product(point for point, _ in intervals))
        volumes.append(_product(width for _, width in intervals).prod(axis=1))
    return np.concatenate(points), np.concatenate(volumes)


def _settled_cells(
    toy: Toy, state: State, weight: float, processing: Processing
) -> tuple[np.ndarray, np.ndarray]:
    """Points (C, 2K + 2): the coin that replaces a rejected first draft comes last."""
    points, volumes = [], []
    for drafted in np.ndindex(*[toy.vocab_size] * len(state.drafts)):
        draft_laws, (first_V, *_) = _laws(toy, state, drafted, weight, processing)
        if any(law_V[token] == 0 for token, law_V in zip(drafted, draft_laws, strict=True)):
            continue
        draws = [
            _split(_boundaries(law_V), "low", within=law_V[:token].sum() + law_V[token] / 2)
            for token, law_V in zip(drafted, draft_laws, strict=True)
        ]
        share = min(1.0, first_V[drafted[0]] / draft_laws[0][drafted[0]])
        residual_V = np.maximum(first_V - draft_laws[0], 0)
        outcomes = [(drafted[0], (share / 2, share), (0.5, 1.0))] if share > 0 else []
        if share < 1:
            for token in np.flatnonzero(residual_V):
                below, mass = residual_V[:token].sum(), residual_V[token]
                settle = ((below + mass / 2) / residual_V.sum(), mass / residual_V.sum())
                outcomes.append((int(token), ((1 + share) / 2, 1 - share), settle))
        for stands, coin, settle in outcomes:
            _, targets = _laws(toy, state, (stands, *drafted[1:]), weight, processing)
            pairs = list(zip(targets[1:], draft_laws[1:], strict=False))
            rows = [*targets[1:], *(np.maximum(target - draft, 0) for target, draft in pairs)]
            coins = [
                _split(np.minimum(1, target[token] / draft[token])[None], "low")
                for token, (target, draft) in zip(drafted[1:], pairs, strict=True)
            ]
            final = _split(np.concatenate([_boundaries(row) for row in rows]), "low")
            fixed = [(np.array([point]), np.array([width])) for point, width in (coin, settle)]
            intervals = [*draws, fixed[0], *coins, final, fixed[1]]
            points.append(_product(point for point, _ in intervals))
            volumes.append(_product(width for _, width in intervals).prod(axis=1))
    return np.concatenate(points), np.concatenate(volumes)


def _certain_cells(
    toy: Toy, plan: Plan, state: State, weight: float, processing: Processing, *, settles: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Coins of positions, each split at the row behind the drafts, or behind what is settled and the drafts.

    The coin that would replace a rejected first draft decides nothing.
    """
    drafted: Tokens = ()
    for i in range(len(state.drafts)):
        (*_, law_V), _ = _laws(
            toy, State(state.history, state.drafts[: i + 1]), (*drafted, 0), weight, processing
        )
        drafted = (*drafted, int(law_V.argmax()))
    idle = (np.array([0.5]), np.array([1.0]))
    unused = plan.num_drafts - len(state.drafts)
    points, volumes = [], []
    for first in range(toy.vocab_size) if settles else [None]:
        stands = drafted if first is None else (first, *drafted[1:])
        _, targets = _laws(toy, state, stands, weight, processing)
        coins = [_split(_boundaries(law_V), "low") for law_V in targets]
        if first is not None:
            below, mass = targets[0][:first].sum(), targets[0][first]
            if mass == 0:
                continue
            coins[0] = (np.array([below + mass / 2]), np.array([mass]))
        intervals = [*[idle] * plan.num_drafts, *coins, *[idle] * unused, *[idle] * settles]
        points.append(_product(point for point, _ in intervals))
        volumes.append(_product(width for _, width in intervals).prod(axis=1))
    return np.concatenate(points), np.concatenate(volumes)
