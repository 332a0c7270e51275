"""How much of a text goes round in circles: what a broken cache or a spent policy looks like from outside.

Acceptance does not tell: such texts are easy to draft. Nor does this figure tell of every broken cache, only
of one whose texts go round; whether tokens follow their law is for log-probabilities to say.

Shapes: B texts, N tokens of all of them, one behind the other.
"""

from collections.abc import Sequence

import numpy as np

MAX_PERIOD = 16
LEAST_TIMES = 3
LEAST_TOKENS = 8  # of a run: shorter ones are numbers, dots and spaces
MOST_REPEATED = 0.5  # of a text that still counts as one that does not repeat itself


def repeated_shares(texts: Sequence[Sequence[int]]) -> np.ndarray:
    """The share of each text's tokens that are repeated, float64 (B,); 0 where it has none.

    A token is repeated if it lies in a run of consecutive tokens that stands for one block of 1 to
    `MAX_PERIOD` tokens written at least `LEAST_TIMES` times in a row (the last writing may break off only
    behind these), and that is `LEAST_TOKENS` long or longer. So in a run of period p each token from the
    p-th on equals the one p places before. Token ids are at least 0. Cost: `MAX_PERIOD` passes over N.
    """
    lengths_B = np.array([len(text) for text in texts], dtype=np.int64)
    # An id of its own behind each text: no run reaches from one into the next.
    parts = [part for place, text in enumerate(texts) for part in (np.asarray(text, np.int64), [-1 - place])]
    if not parts:
        return np.zeros(0)
    tokens_N = np.concatenate(parts)
    covers_N = np.zeros(len(tokens_N) + 1, dtype=np.int64)  # runs that begin less runs that have ended
    for period in range(1, min(MAX_PERIOD, len(tokens_N) - 1) + 1):
        equal_N = np.concatenate([[0], tokens_N[period:] == tokens_N[:-period], [0]])
        change_N = np.diff(equal_N.astype(np.int8))
        starts_R, ends_R = np.flatnonzero(change_N == 1), np.flatnonzero(change_N == -1)
        is_long_R = ends_R - starts_R + period >= max(LEAST_TIMES * period, LEAST_TOKENS)
        covers_N[starts_R[is_long_R]] += 1
        covers_N[ends_R[is_long_R] + period] -= 1
    is_repeated_N = covers_N.cumsum()[:-1] > 0
    ends_B = np.cumsum(lengths_B + 1)
    total_B = np.diff(np.concatenate([[0], is_repeated_N.cumsum()[ends_B - 1]]))
    return total_B / np.maximum(lengths_B, 1)
