"""Laws as the checks read them: float64, in NumPy, apart from the code under test."""

import numpy as np
from torch import Tensor

from blockroll.errors import InvalidInput


def as_law(law_V: Tensor | np.ndarray, name: str = "the claimed law") -> np.ndarray:
    """Float64 probabilities (..., V), as given; InvalidInput unless each row sums to one within 1e-5."""
    law = np.asarray(law_V.detach().cpu().numpy() if isinstance(law_V, Tensor) else law_V, dtype=np.float64)
    if law.ndim == 0 or law.shape[-1] == 0:
        raise InvalidInput(f"{name} needs at least one probability, got shape {law.shape}")
    if not (law >= 0).all() or np.abs(law.sum(axis=-1) - 1).max(initial=0.0) > 1e-5:
        raise InvalidInput(
            f"{name} must be probabilities of at least 0 that sum to one, got the smallest {law.min():.3g} "
            f"and sums from {law.sum(axis=-1).min():.9g} to {law.sum(axis=-1).max():.9g}; normalise it first"
        )
    return law


def softmax(logits: Tensor | np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Float64 softmax of logits (..., V) over a temperature above 0."""
    if not temperature > 0:
        raise InvalidInput(
            f"this check needs a temperature above 0, got {temperature}; check greedy on tables"
        )
    raw = logits.detach().cpu().numpy() if isinstance(logits, Tensor) else logits
    scaled = np.asarray(raw, dtype=np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))
