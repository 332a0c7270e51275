"""What grows with a text, a token at a time: its ids as a tensor, and how often it holds each token.

Shapes: T tokens of a text.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class TokenCounts:
    """How often a text holds each token it has. Each token is counted once, when it is first seen here.

    Shapes: U tokens that differ, in the order in which they came.
    """

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        """Of the prompt alone, so far."""
        self._place: dict[int, int] = {}
        self._ids_U = np.zeros(0, dtype=np.int64)
        self._counts_2U = np.zeros((2, 0))  # of prompt and completion, and of the completion alone
        self._num_counted = 0  # of the completion
        self._add(prompt_ids, slice(0, 1))

    def with_completion(self, token_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids, int64 (U,); and how often prompt and completion hold them, and the completion: (2, U)."""
        self._add(token_ids[self._num_counted :], slice(0, 2))
        self._num_counted = len(token_ids)
        return self._ids_U[: len(self._place)], self._counts_2U[:, : len(self._place)]

    def of(self, token_ids: Sequence[int]) -> np.ndarray:
        """The counts of these tokens, as far as they have been taken: (2, len(token_ids))."""
        counts = np.zeros((2, len(token_ids)))
        for index, token_id in enumerate(token_ids):
            place = self._place.get(token_id)
            if place is not None:
                counts[:, index] = self._counts_2U[:, place]
        return counts

    def _add(self, token_ids: Sequence[int], counted: slice) -> None:
        for token_id in token_ids:
            place = self._place.setdefault(token_id, len(self._place))
            if place == len(self._ids_U):
                room = max(64, place)
                self._ids_U = np.concatenate([self._ids_U, np.zeros(room, dtype=np.int64)])
                self._counts_2U = np.concatenate([self._counts_2U, np.zeros((2, room))], axis=1)
            self._ids_U[place] = token_id
            self._counts_2U[counted, place] += 1


class IdBuffer:
    """The ids of a text in one tensor with room behind them."""

    def __init__(self, prompt_ids: Sequence[int], device: torch.device) -> None:
        """Of the prompt alone, so far."""
        self._ids_T = torch.tensor(prompt_ids, dtype=torch.int64, device=device)
        self._num_prompt = len(prompt_ids)
        self._num_written = 0  # of the completion

    def with_completion(self, token_ids: Sequence[int], between: Sequence[int]) -> Tensor:
        """Prompt, completion and the tokens behind it: int64 (1, T), a copy."""
        new = (*token_ids[self._num_written :], *between)
        start = self._num_prompt + self._num_written
        stop = start + len(new)
        if stop > len(self._ids_T):
            self._ids_T = torch.cat([self._ids_T, self._ids_T.new_zeros(stop)])
        if new:
            self._ids_T[start:stop] = torch.tensor(new, dtype=torch.int64, device=self._ids_T.device)
        self._num_written = len(token_ids)
        return self._ids_T[None, :stop].clone()
