"""Laws of rows by the plain formula, in NumPy and float64, for the ops that verify and draw.

Shapes: B requests, K drafts, L rows, U edited tokens, V vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

from blockroll.kernels.rows import Cut, Edits, LogitRows

SIZE, NUM_DRAFTS = 6, 3
TEMPERATURES = torch.tensor([1.0, 0.7, 0.0, 1.6, 1.0, 0.3], dtype=torch.float64)
SMALL, WIDE = 63, 16_403  # a law held as probabilities, and one of which a row at a time is read
WAYS = {"probabilities": SMALL, "torch": WIDE, "compiled": WIDE}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coins(*shape: int, seed: int = 9) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def top_k_of(k: float) -> Cut:
    """That of every request but the last, which is not cut."""
    top_k_B = torch.full((SIZE,), k, dtype=torch.float64)
    top_k_B[-1] = 0
    return Cut(top_k_B, torch.ones(SIZE, dtype=torch.float64), torch.zeros(SIZE, dtype=torch.float64))


def edits_of(num_rows: int, vocab_size: int) -> Edits:
    """Five tokens of each row, of which one is left out."""
    ids_BU = torch.stack(
        [torch.randperm(vocab_size, generator=torch.Generator().manual_seed(b))[:5] for b in range(SIZE)]
    )
    logits_BLU = 3 * random(SIZE, num_rows, 5, seed=4).double()
    logits_BLU[..., 0] = -torch.inf
    return Edits(ids_BU, logits_BLU)


def probs_by_hand(rows: LogitRows) -> np.ndarray:
    """softmax(edit(w z + (1 - w) z_draft) / T), cut to its k best tokens: (B, L, V)."""
    logits_BLV = rows.logits_BLV.double().numpy().copy()
    probs_BLV = np.zeros_like(logits_BLV)
    for b, logits_LV in enumerate(logits_BLV):
        for i, logits_V in enumerate(logits_LV):
            if rows.mix is not None and i < int(rows.mix.num_drafts_B[b]) and float(rows.mix.weight_B[b]) < 1:
                weight = float(rows.mix.weight_B[b])
                drafted_V = rows.mix.draft_logits_BKV[b, i].double().numpy()
                logits_V = weight * logits_V + (1 - weight) * drafted_V
            if rows.edits is not None:
                logits_V[rows.edits.ids_BU[b].numpy()] = rows.edits.logits_BLU[b, i].numpy()
            probs_BLV[b, i] = _cut(_tempered(logits_V, float(rows.temperature_B[b])), rows.cut, b)
    return probs_BLV


def _tempered(logits_V: np.ndarray, temperature: float) -> np.ndarray:
    if temperature == 0:
        best_V = np.zeros_like(logits_V)
        best_V[logits_V.argmax()] = 1
        return best_V
    weights_V = np.exp((logits_V - logits_V.max()) / temperature)
    return weights_V / weights_V.sum()


def _cut(probs_V: np.ndarray, cut: Cut | None, b: int) -> np.ndarray:
    k = 0 if cut is None else int(cut.top_k[b])
    if not 0 < k < len(probs_V):
        return probs_V
    kept_V = np.zeros_like(probs_V)
    best = np.argsort(-probs_V, kind="stable")[:k]
    kept_V[best] = probs_V[best]
    return kept_V / kept_V.sum()


def token_at(weights_V: np.ndarray, uniform: float) -> tuple[int, float, float, float]:
    """The token whose interval holds the uniform, where that begins and ends, and all weights."""
    cumulative_V = weights_V.cumsum()
    token = int(np.searchsorted(cumulative_V, uniform * cumulative_V[-1], side="right"))
    return token, cumulative_V[token] - weights_V[token], cumulative_V[token], cumulative_V[-1]
