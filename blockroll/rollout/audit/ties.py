"""Where rounding decides what a law is: a greedy choice or a cut (top-k, top-p, min-p) between near equals.

Another machine's forward rounds differently, so what is recomputed may have the other token, and no bound on
probabilities holds. Shapes: B rows, V vocabulary.
"""

import numpy as np

from blockroll.types import Sampling

CUT = 2e-4  # share of a probability: two that lie closer may change places, each moving by half of it


def is_tied(soft_BV: np.ndarray, tokens_B: np.ndarray, tolerance: float) -> np.ndarray:
    """Which greedy rows rounding could have decided otherwise: of the two best the token may be either."""
    best_B2 = np.sort(soft_BV, axis=1)[:, -2:]
    mine_B = soft_BV[np.arange(len(soft_BV)), tokens_B]
    is_close_B: np.ndarray = np.minimum(mine_B, best_B2[:, 0]) >= best_B2[:, 1] - tolerance
    return is_close_B


def is_cut_close(probs_BV: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Rows, not cut yet, of which rounding could have made top-k, top-p or min-p keep others; bool (B,)."""
    sorted_BV = -np.sort(-probs_BV, axis=1)
    is_close_B = np.zeros(len(sorted_BV), dtype=bool)
    if 0 < sampling.top_k < sorted_BV.shape[1]:
        is_close_B |= _are_near(sorted_BV[:, sampling.top_k - 1], sorted_BV[:, sampling.top_k])
        sorted_BV[:, sampling.top_k :] = 0.0
    if sampling.top_p < 1:
        before_BV = sorted_BV.cumsum(axis=1) - sorted_BV
        edge_B1 = sampling.top_p * sorted_BV.sum(axis=1, keepdims=True)
        is_close_B |= ((np.abs(before_BV - edge_B1) <= CUT * edge_B1) & (sorted_BV > 0)).any(axis=1)
        num_kept_B = ((before_BV < edge_B1) & (sorted_BV > 0)).sum(axis=1)
        rows, padded_BV = np.arange(len(sorted_BV)), np.pad(sorted_BV, ((0, 0), (0, 1)))
        is_close_B |= _are_near(padded_BV[rows, num_kept_B - 1], padded_BV[rows, num_kept_B])
    if sampling.min_p:
        edge_B1 = sampling.min_p * sorted_BV[:, :1]
        is_close_B |= (np.abs(sorted_BV - edge_B1) <= CUT * edge_B1).any(axis=1)
    return is_close_B


def _are_near(kept_B: np.ndarray, left_B: np.ndarray) -> np.ndarray:
    is_near_B: np.ndarray = (kept_B > 0) & (kept_B - left_B <= CUT * kept_B)
    return is_near_B
