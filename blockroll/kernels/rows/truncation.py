"""Truncation: the law of a row on the tokens that top-k, top-p and min-p keep.

What is cut stays in the type its weights have. Orders and formulae are those of transformers and vLLM, except
that of equal probabilities at an edge those of lowest id stay.

Shapes: B requests, L rows, N rows, M candidates of a row, V vocabulary.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from blockroll.kernels import transfer
from blockroll.kernels.rows.weights import Weights

_FEW = 1 << 10  # tokens that are sorted faster than the best of them are found
_HOPED = 1 << 9  # the first guess: each token that top-p keeps is this part of what may go, at least
_SMALLEST = torch.tensor(5e-324, dtype=torch.float64)
_SMALLEST_FLOAT32 = 1e-45
_MANY = 1 << 10  # tokens that take longer to sort than a row to be divided by size
_SIZE_SHIFT = 17  # leaves of a float32 its exponent and six bits: tokens within a part in 64


class Cut(NamedTuple):
    """Truncation by request, float64 (B,), or (B, 1, 1) against rows; off are 0, 1 and 0."""

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    is_everywhere: bool = False  # known that every request is cut

    def of(self, requests: slice | Tensor) -> "Cut":
        """That of some requests."""
        return Cut(
            self.top_k[requests], self.top_p[requests], self.min_p[requests], is_everywhere=self.is_everywhere
        )

    def by_row(self, num_rows: int) -> "Cut":
        """Of each row, where every request has so many, one request after another."""
        top_k, top_p, min_p = (each.repeat_interleave(num_rows) for each in self[:3])
        return Cut(top_k, top_p, min_p, is_everywhere=self.is_everywhere)

    @property
    def is_cut(self) -> Tensor:
        """Where any token may go."""
        return (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)


def truncate(probs_BLV: Tensor, cut_B: Cut) -> Tensor:
    """The law on the tokens that top-k, then top-p, then min-p keep, normalised; the best token always stays.

    Exactly k tokens stay; top-p keeps the fewest that hold the mass, of what top-k left.
    """
    mass_BL1 = probs_BLV.sum(dim=-1, keepdim=True)
    kept_BLM, ids_BLM = _kept(probs_BLV, mass_BL1, cut_B)
    kept_BLM /= kept_BLM.sum(dim=-1, keepdim=True)
    # Behind the last candidate of a row stands token 0, without weight: it is added, not written.
    kept_BLV = torch.zeros_like(probs_BLV).scatter_add_(-1, ids_BLM, kept_BLM)
    # A row that is not truncated stays as it is, bit for bit.
    return kept_BLV if cut_B.is_everywhere else torch.where(cut_B.is_cut[:, None, None], kept_BLV, probs_BLV)


def truncated(whole: Weights, cut_N: Cut) -> Weights:
    """As `truncate`, of the weights of a large vocabulary: where every row is cut, those that stay alone."""
    assert whole.mass_N is not None
    weights_NV, is_cut_N = whole.weights_NM, cut_N.is_cut
    if not transfer.is_free(weights_NV.device):
        kept_N1V, _ = _kept(weights_NV[:, None], whole.mass_N[:, None, None], cut_N)
        kept_NV = kept_N1V[:, 0].to(weights_NV.dtype)
        return Weights.normalized(torch.where(is_cut_N[:, None], kept_NV, weights_NV))
    if not is_cut_N.any():
        return whole
    is_flat_N = _is_flat(weights_NV, whole.mass_N, cut_N)
    if is_flat_N is not None:
        kept_NV = weights_NV.clone()
        for row in is_flat_N.nonzero().flatten().tolist():
            top_p, min_p, mass = (each_N[row].item() for each_N in (cut_N.top_p, cut_N.min_p, whole.mass_N))
            kept_NV[row] = _kept_of_flat(weights_NV[row], top_p * mass, min_p)
        others_R = (~is_flat_N & is_cut_N).nonzero().squeeze(1)
        if len(others_R):
            mass_R11 = whole.mass_N[others_R, None, None]
            kept_R1M, ids_R1M = _kept(weights_NV[others_R][:, None], mass_R11, cut_N.of(others_R))
            kept_RM = kept_R1M[:, 0].to(weights_NV.dtype)
            kept_NV[others_R] = torch.zeros_like(kept_NV[others_R]).scatter_add_(1, ids_R1M[:, 0], kept_RM)
        return Weights.normalized(kept_NV)
    kept_N1M, ids_N1M = _kept(weights_NV[:, None], whole.mass_N[:, None, None], cut_N)
    kept_NM, ids_NM = kept_N1M[:, 0], ids_N1M[:, 0]
    if is_cut_N.all():
        return Weights.normalized(kept_NM, ids_NM)
    kept_NV = torch.zeros_like(weights_NV).scatter_add_(1, ids_NM, kept_NM.to(weights_NV.dtype))
    return Weights.normalized(torch.where(is_cut_N[:, None], kept_NV, weights_NV))


def _is_flat(weights_NV: Tensor, mass_N: Tensor, cut_N: Cut) -> Tensor | None:
    """Rows of which top-p keeps too many tokens to sort them, bool (N,); None: there is none.

    Only of float32 rows on a CPU.
    """
    is_free_N = (cut_N.top_k == 0) & (cut_N.top_p < 1)
    if not (weights_NV.is_cpu and weights_NV.dtype == torch.float32 and is_free_N.any()):
        return None
    least_N = ((1 - cut_N.top_p) / _HOPED * mass_N).float()
    is_likely_NV = weights_NV >= least_N[:, None]
    held_N = torch.where(is_likely_NV, weights_NV, 0.0).sum(dim=-1)
    is_flat_N = is_free_N & ((is_likely_NV.sum(dim=-1) > _MANY) | (held_N < cut_N.top_p * mass_N))
    return is_flat_N if is_flat_N.any() else None


def _kept_of_flat(weights_V: Tensor, goal: float, min_p: float) -> Tensor:
    """The fewest tokens of a float32 row that hold so much, each as it is, and 0 for others.

    Sums of tokens of about the same size tell of which size some stay and some go: these alone are sorted.
    """
    weights = weights_V.numpy()
    size_V = weights.view(np.int32) >> _SIZE_SHIFT  # ascends as numbers that are not negative do
    above = np.bincount(size_V, weights=weights)[::-1].cumsum()
    edge = max(len(above) - 1 - int(np.searchsorted(above, goal)), 0)
    before = above[len(above) - 2 - edge] if edge < len(above) - 1 else 0.0
    at_edge = np.flatnonzero(size_V == edge)
    at_edge = at_edge[np.argsort(-weights[at_edge], kind="stable")]
    edge_weights = weights[at_edge].astype(np.float64)
    is_kept_V = size_V > edge
    is_kept_V[at_edge[before + edge_weights.cumsum() - edge_weights < goal]] = True
    if min_p > 0:
        is_kept_V &= weights >= np.float64(min_p) * weights.max()
    return torch.from_numpy(np.where(is_kept_V, weights, np.float32(0)))


def _kept(probs_BLV: Tensor, mass_BL1: Tensor, cut_B: Cut) -> tuple[Tensor, Tensor]:
    """The tokens that stay, among few others that hold 0 now, float64 (B, L, M); and their ids, ascending."""
    top_k, top_p, min_p = (option_B[:, None, None] for option_B in cut_B[:3])
    cut = Cut(top_k, top_p, min_p)
    probs_BLM, ids_BLM = _candidates(probs_BLV, mass_BL1, cut)
    sorted_BLM, order_BLM = probs_BLM.sort(dim=-1, descending=True, stable=True)
    ranks_M = torch.arange(sorted_BLM.shape[-1], device=probs_BLV.device)
    kept_BLM = torch.where((ranks_M < cut.top_k) | (cut.top_k == 0), sorted_BLM, 0.0)
    mass_BL1 = torch.where(cut.top_k == 0, mass_BL1, kept_BLM.sum(dim=-1, keepdim=True))
    before_BLM = kept_BLM.cumsum(dim=-1) - kept_BLM
    is_kept_BLM = (kept_BLM > 0) & ((before_BLM < cut.top_p * mass_BL1) | (cut.top_p >= 1))
    is_kept_BLM &= sorted_BLM >= cut.min_p * sorted_BLM[..., :1]
    kept_BLM = torch.where(is_kept_BLM, kept_BLM, 0.0)
    return torch.zeros_like(kept_BLM).scatter_(-1, order_BLM, kept_BLM), ids_BLM


def _candidates(probs_BLV: Tensor, mass_BL1: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
    """Of each row all tokens that may stay, float64 (B, L, M), in the order of their ids; and these.

    Rows with fewer of them than others end in weights of 0. Only these few are sorted: a row that is cut
    tells beforehand which probability a token needs at least to stay. How many they are only a look says: a
    device sorts them all.
    """
    vocab_size = probs_BLV.shape[-1]
    if vocab_size <= _FEW or not probs_BLV.numel() or not transfer.is_free(probs_BLV.device):
        ids_V = torch.arange(vocab_size, device=probs_BLV.device)
        return probs_BLV.double(), ids_V.expand(probs_BLV.shape)
    is_free = (cut.top_k == 0) & (cut.top_p < 1)  # top-p of all tokens
    least = torch.maximum(_least_of_best(probs_BLV, cut.top_k), _SMALLEST)
    by_min_p = torch.maximum(cut.min_p * probs_BLV.amax(dim=-1, keepdim=True), least)
    # What is less than its share of the mass that may go adds up to no more than that mass.
    by_top_p = torch.maximum((1 - cut.top_p) / (2 * vocab_size) * mass_BL1, by_min_p)
    safe = torch.where(cut.top_k > 0, least, torch.where(is_free, by_top_p, by_min_p))
    safe = torch.where(cut.is_cut, safe, torch.inf)
    # Mostly the fewest tokens that hold the mass are far fewer, and each of them is far more likely.
    least = torch.where(is_free, torch.maximum((1 - cut.top_p) / _HOPED * mass_BL1, safe), safe)
    probs_BLM, ids_BLM = _at_least(probs_BLV, least)
    while True:
        is_short = (least > safe) & (probs_BLM.sum(dim=-1, keepdim=True) < cut.top_p * mass_BL1)
        if not is_short.any():
            return probs_BLM, ids_BLM
        least = torch.where(is_short, torch.maximum(least / 8, safe), least)
        probs_BLM, ids_BLM = _at_least(probs_BLV, least)


def _least_of_best(probs_BLV: Tensor, top_k_B11: Tensor) -> Tensor:
    """A probability that at least k tokens of each row have, and few more; 0 where k is 0 or above V."""
    size, num_rows, vocab_size = probs_BLV.shape
    k_B11 = top_k_B11.long()
    most = int(k_B11.where(k_B11 < vocab_size, 0).max())
    if most == 0:
        return torch.zeros_like(probs_BLV[..., :1], dtype=torch.float64)
    # Blocks that hold a token of a probability are no more than the tokens that have it.
    width = max(1, vocab_size // (8 * most))
    num_blocks = vocab_size // width
    blocks = probs_BLV[..., : num_blocks * width].reshape(size, num_rows, num_blocks, width)
    best_BLk = blocks.amax(dim=-1).topk(most, dim=-1).values
    is_on_B11 = (k_B11 > 0) & (k_B11 < vocab_size)
    index_BL1 = (k_B11 - 1).clamp(0, most - 1).expand(size, num_rows, 1)
    return torch.where(is_on_B11, best_BLk.gather(-1, index_BL1).double(), 0.0)


def _at_least(probs_BLV: Tensor, least_BL1: Tensor) -> tuple[Tensor, Tensor]:
    """What is at least so likely, float64, by id, and the ids: (B, L, M), filled up with zeros."""
    size, num_rows, vocab_size = probs_BLV.shape
    if probs_BLV.dtype == torch.float32:  # whose rows are compared as they are, by a bound a little lower
        least_BL1 = torch.nextafter(least_BL1.float(), torch.tensor(0.0)).clamp(min=_SMALLEST_FLOAT32)
    # NumPy compares, and looks through what comes of it, several times as fast as torch.
    flat_N = torch.from_numpy(np.flatnonzero(probs_BLV.numpy() >= least_BL1.numpy()))
    row_N = flat_N // vocab_size
    count_R = torch.bincount(row_N, minlength=size * num_rows)
    width = max(1, int(count_R.max()))
    shift_R = torch.arange(len(count_R), device=count_R.device) * width - (count_R.cumsum(0) - count_R)
    place_N = torch.arange(len(row_N), device=row_N.device) + shift_R[row_N]
    probs_BLM = probs_BLV.new_zeros((size, num_rows, width), dtype=torch.float64)
    probs_BLM.view(-1)[place_N] = probs_BLV.reshape(-1)[flat_N].double()
    ids_BLM = torch.zeros(probs_BLM.shape, dtype=torch.int64, device=row_N.device)
    ids_BLM.view(-1)[place_N] = flat_N - row_N * vocab_size
    return probs_BLM, ids_BLM
