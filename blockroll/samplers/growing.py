"""What grows with a text, a token at a time: its ids as a tensor, and how often it holds each token.

Shapes: T tokens of a text, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class TokenCounts:
    """How often a text holds each token. Each token is counted once, when it is first seen here."""

    def __init__(self, prompt_ids: Sequence[int], vocab_size: int, device: torch.device) -> None:
        """Of the prompt alone, so far."""
        self._counts_2V = torch.zeros((2, vocab_size), dtype=torch.float64, device=device)
        self._num_counted = 0  # of the completion
        self._add(self._counts_2V[:1], prompt_ids)

    def with_completion(self, token_ids: Sequence[int]) -> Tensor:
        """Of prompt and completion, and of the completion alone: float64 (2, V). It only ever grows."""
        self._add(self._counts_2V, token_ids[self._num_counted :])
        self._num_counted = len(token_ids)
        return self._counts_2V

    def _add(self, counts_NV: Tensor, token_ids: Sequence[int]) -> None:
        if token_ids:
            ids_T = torch.tensor(token_ids, dtype=torch.int64, device=counts_NV.device)
            ones_NT = torch.ones((len(counts_NV), len(token_ids)), dtype=counts_NV.dtype, device=ids_T.device)
            counts_NV.index_add_(1, ids_T, ones_NT)


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
