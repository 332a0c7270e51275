"""Laws of positions, however they are held.

Shapes: B requests, L rows, N of these rows from the first on, V vocabulary.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Rows(ABC):
    """Laws of (B, L) positions over V tokens."""

    @property
    @abstractmethod
    def shape(self) -> "torch.Size":
        """(B, L, V)."""

    @abstractmethod
    def probs_of(self, token_ids_BN: "Tensor") -> "Tensor":
        """Probability of a token in each of the first N rows, float64 (B, N)."""

    @abstractmethod
    def at(self, requests_N: "Tensor", offsets_N: "Tensor") -> "Tensor":
        """These rows, each of a request and at an offset, float64 (N, V)."""

    @abstractmethod
    def behind_first(self) -> Self:
        """All rows but the first of each request."""

    @abstractmethod
    def dense(self) -> "Tensor":
        """All probabilities, float64 (B, L, V)."""
