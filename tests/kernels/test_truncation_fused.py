"""What threshold passes leave of rows, interpreted: the tokens that sorting leaves.

Shapes: B requests, N rows, V vocabulary.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from blockroll.kernels.choice import using
from blockroll.kernels.rows import Cut, LogitRows, fused_cut, fused_laws, target_probs, tiles
from blockroll.kernels.rows.fused_laws import tiled
from blockroll.kernels.rows.fused_sources import source_of
from blockroll.kernels.rows.truncation import truncate
from tests.kernels.planted import planted


@pytest.fixture(autouse=True)
def _triton():
    with using("triton"):
        yield


def cuts(*of_requests: tuple[float, float, float]) -> Cut:
    """Top-k, top-p and min-p of each request."""
    return Cut(*torch.tensor(of_requests, dtype=torch.float64).T.contiguous())


def kept(logits_BV: Tensor, cut: Cut, temperature: float = 1.0) -> Tensor:
    """Which tokens stay, bool (B, V), by what kernels say of the rows; their masses add up to one."""
    size, vocab_size = logits_BV.shape
    temperature_B = torch.full((size,), temperature, dtype=torch.float64)
    known = tiled(source_of(LogitRows(logits_BV[:, None], temperature_B, temperature == 0, cut)))
    masses_B = known.mass_BLT.sum(dim=(1, 2))
    torch.testing.assert_close(masses_B, torch.ones_like(masses_B), rtol=0, atol=1e-12)
    width = tiles.shape_of(vocab_size).width
    top_BV = known.top_BLT[:, 0].repeat_interleave(width, dim=1)[:, :vocab_size]
    wide = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    keys_BV = (top_BV - wide).view(known.edge_BL.dtype)
    is_tie_BV = keys_BV == known.edge_BL
    return (keys_BV < known.edge_BL) | (is_tie_BV & (torch.arange(vocab_size) <= known.last_BL))


def sorted_out(logits_BV: Tensor, cut: Cut, temperature: float = 1.0) -> Tensor:
    """The same by the definition, in float64."""
    temperature_B = torch.full((len(logits_BV),), temperature, dtype=torch.float64)
    return truncate(target_probs(logits_BV.double()[:, None], temperature_B), cut)[:, 0] > 0


RANDOM = cuts(
    (0, 1, 0), (1, 1, 0), (7, 1, 0), (0, 0.9, 0), (0, 0.3, 0), (0, 1, 0.05), (20, 0.8, 0), (20, 0.8, 0.1),
    (5, 0.99, 0), (0, 0.999, 0.001), (1_000_000, 1, 0), (0, 1e-9, 0), (0, 1, 1.0),
)  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, pytest.param(0.6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("vocab_size", [63, pytest.param(9_001, marks=pytest.mark.slow)])
def test_thresholds_leave_what_sorting_leaves(vocab_size, temperature):
    logits_BV = 3 * torch.randn(len(RANDOM.top_k), vocab_size, generator=torch.Generator().manual_seed(5))
    assert torch.equal(kept(logits_BV, RANDOM, temperature), sorted_out(logits_BV, RANDOM, temperature))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_thresholds_of_other_types(dtype):
    """Of bfloat16 many tokens are equal: those of the lowest ids stay."""
    logits_BV = (3 * torch.randn(len(RANDOM.top_k), 500, generator=torch.Generator().manual_seed(6))).to(
        dtype
    )
    assert torch.equal(kept(logits_BV, RANDOM), sorted_out(logits_BV, RANDOM))


def test_of_equal_tokens_at_the_edge_the_lowest_ids_stay_in_whatever_tile_they_are():
    logits_BV = torch.zeros(2, 8_300)
    logits_BV[:, 17] = 1.0
    found = kept(logits_BV, cuts((4_200, 1, 0), (4_200, 0.5, 0)))
    assert found.sum(dim=1)[0] == 4_200
    assert found[0].nonzero().flatten().tolist() == [*range(4_200)]
    assert torch.equal(found[1], sorted_out(logits_BV, cuts((4_200, 0.5, 0)).of(slice(1)))[0])


@pytest.mark.parametrize(
    ("top_p", "count"), [(0.5, 4), (0.5 + 1e-12, 5), (0.5 - 1e-12, 4), (0.125, 1), (1.0, 8)]
)
def test_top_p_keeps_the_fewest_that_hold_the_mass(top_p, count):
    """Of eight equal tokens, whose masses are exact: a token stays if what is before it is less."""
    found = kept(torch.zeros(1, 8), cuts((0, top_p, 0)))
    assert found[0].tolist() == [True] * count + [False] * (8 - count)


def test_a_mass_of_what_top_k_left_is_what_top_p_holds():
    """Four of eight stay by top-k, and half of their mass are two of them."""
    assert kept(torch.zeros(1, 8), cuts((4, 0.5, 0)))[0].sum() == 2
    assert kept(torch.tensor([[0.0, 0, -1e9, 0, 0, 0]]), cuts((9, 0.5, 0)))[
        0
    ].nonzero().flatten().tolist() == [0, 1, 3]


def test_tokens_that_are_left_out_never_stay():
    logits_BV = torch.full((3, 40), -torch.inf)
    logits_BV[:, 5], logits_BV[:, 33] = 1.0, 0.0
    found = kept(logits_BV, cuts((3, 1, 0), (0, 0.9, 0), (0, 1, 0.01)))
    assert torch.equal(found & logits_BV.isfinite(), logits_BV.isfinite())
    assert found[1].nonzero().flatten().tolist() == [5, 33]


def test_the_best_token_of_a_greedy_row_is_the_first_of_equal_ones():
    logits_BV = torch.zeros(2, 9_000)
    logits_BV[1, 4_500] = logits_BV[1, 8_999] = 2.0
    found = kept(logits_BV, cuts((3, 0.9, 0), (0, 1, 0)), temperature=0.0)
    assert found.nonzero().tolist() == [[0, 0], [1, 4_500]]


def test_logits_of_any_size_have_an_edge():
    """Gaps from the smallest that float32 has to infinity."""
    sizes = torch.tensor([0, 1e-38, 1e-30, 1e-7, 1.0, 1e10, 1e30, 3e38])
    found = kept(-sizes.expand(7, -1), cuts(*((k, 1.0, 0.0) for k in range(1, 8))))
    assert found.sum(dim=1).tolist() == [1, 2, 3, 4, 5, 6, 7]


PLANTED = {
    "a token stays if what is before it is the mass": (
        "limit * tl.load(KEPT + cell))",
        "limit * tl.load(KEPT + cell) * (1 + 1e-9))",
    ),
    "all that equal the last one stay": ("is_tie_C & (order_C == rank)", "is_tie_C & (order_C < 0)"),
    "top-p holds the mass of all": ("tl.store(KEPT + cell, tl.load", "tl.store(BELOW + cell, tl.load"),
    "one token too many": ("(goal - count).to(tl.int32)", "(goal - count + 1).to(tl.int32)"),
    "min-p is forgotten": ("if (stage == 1) & (gap", "if (stage == 2) & (gap"),
}


def assert_counts_at_edges():
    logits_BV = torch.zeros(4, 8)
    logits_BV[0, 4:], logits_BV[3, 1] = -1.0, -9.0
    whole = 4 + 4 * float(np.exp(np.float32(-1)))
    assert 4 / whole * whole == 4  # what the first four hold, to the last bit
    cut, counts = cuts((0, 4 / whole, 0), (4, 1, 0), (4, 0.5, 0), (0, 1, 0.5)), [4, 4, 2, 7]
    assert kept(logits_BV, cut).sum(dim=1).tolist() == counts


def test_rows_whose_edges_are_exact_keep_as_many_as_they_should():
    assert_counts_at_edges()


@pytest.mark.parametrize("wrong", PLANTED)
def test_planted_thresholds_are_found(tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(fused_laws, "cut", planted(tmp_path, fused_cut, *PLANTED[wrong]).cut)
    with pytest.raises(AssertionError):
        assert_counts_at_edges()
