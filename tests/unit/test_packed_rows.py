"""Laws of packed rows are those of the rectangle, at every cell that is a request's own."""

import pytest
import torch

from blockroll.kernels.block_verify import chosen_logprobs
from blockroll.kernels.rows import At, Cut, LogitRows, PackedLogits, PackedRows
from blockroll.kernels.rows.logit_rows import looked_at

NUM_ROWS = torch.tensor([1, 4, 1, 2])
WIDTH, VOCAB = 4, 50


def rows(temperatures, *, cut=None, seed=0):
    """The same laws packed and as a rectangle, and which cells are a request's own."""
    generator = torch.Generator().manual_seed(seed)
    logits_BLV = 3 * torch.randn(4, WIDTH, VOCAB, generator=generator)
    is_own_BL = torch.arange(WIDTH) < NUM_ROWS[:, None]
    packed = PackedLogits(
        logits_NV=logits_BLV[is_own_BL],
        starts_B=NUM_ROWS.cumsum(0) - NUM_ROWS,
        num_rows_B=NUM_ROWS,
        width=WIDTH,
    )
    temperature_B = torch.tensor(temperatures, dtype=torch.float64)
    has_greedy = bool((temperature_B == 0).any())
    return (
        PackedRows(packed, temperature_B, has_greedy, cut),
        LogitRows(logits_BLV, temperature_B, has_greedy, cut),
        is_own_BL,
    )


def uniforms(shape):
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


CUT = Cut(
    top_k=torch.tensor([0.0, 7, 0, 0], dtype=torch.float64),
    top_p=torch.tensor([1.0, 1, 0.6, 1], dtype=torch.float64),
    min_p=torch.tensor([0.0, 0, 0, 0.2], dtype=torch.float64),
)


@pytest.mark.parametrize("cut", [None, CUT], ids=["whole", "cut"])
@pytest.mark.parametrize("temperatures", [(1.0, 0.7, 2.0, 1.0), (0.0, 1.0, 0.0, 0.5)])
def test_what_is_read_of_packed_rows_is_what_the_rectangle_says(temperatures, cut):
    packed, rectangle, is_own_BL = rows(temperatures, cut=cut)
    assert packed.shape == rectangle.shape
    for width in (WIDTH, WIDTH - 1):
        ids_BN = torch.randint(VOCAB, (4, width), generator=torch.Generator().manual_seed(1))
        own_BN = is_own_BL[:, :width]
        assert torch.equal(packed.probs_of(ids_BN)[own_BN], rectangle.probs_of(ids_BN)[own_BN])
        assert (packed.probs_of(ids_BN)[~own_BN] == 0).all()
    coins_BL = uniforms((4, WIDTH))
    requests, offsets = is_own_BL.nonzero().flip(0).unbind(dim=1)
    coins_N = coins_BL[requests, offsets]
    for found, expected in zip(
        looked_at(packed, At(requests, offsets), coins_N),
        looked_at(rectangle, At(requests, offsets), coins_N),
        strict=True,
    ):
        assert torch.equal(found, expected)
    assert torch.equal(packed.at(requests, offsets), rectangle.at(requests, offsets))
    assert torch.equal(packed.at(requests, offsets + WIDTH), rectangle.at(requests, NUM_ROWS[requests] - 1))
    assert torch.equal(packed.dense()[is_own_BL], rectangle.dense()[is_own_BL])
    assert torch.allclose(packed.dense().sum(dim=-1), torch.ones(4, WIDTH, dtype=torch.float64))


def test_rows_behind_the_first_are_the_same_laws_one_cell_further():
    packed, rectangle, is_own_BL = rows((1.0,) * 4)
    behind, want = packed.behind_first(), rectangle.behind_first()
    assert torch.equal(behind.dense()[is_own_BL[:, 1:]], want.dense()[is_own_BL[:, 1:]])


def test_log_probabilities_are_computed_of_chosen_cells_alone_part_by_part():
    packed, rectangle, is_own_BL = rows((1.0, 0.5, 0.0, 1.0))
    ids_BL = torch.randint(VOCAB, (4, WIDTH), generator=torch.Generator().manual_seed(1))
    temperature_B = rectangle.temperature_B
    scaled = (
        rectangle.logits_BLV.double() / torch.where(temperature_B == 0, 1.0, temperature_B)[:, None, None]
    )
    exact_BL = scaled.log_softmax(-1).gather(-1, ids_BL[..., None]).squeeze(-1)
    want = exact_BL.where(is_own_BL, 0.0)
    parts = (rectangle.logits_BLV[:, :1], rectangle.logits_BLV[:, 1:])
    for logits in (parts, (packed.packed,)):
        torch.testing.assert_close(
            chosen_logprobs(logits, is_own_BL, ids_BL, temperature_B), want, rtol=0, atol=1e-12
        )


def test_rows_that_are_not_finite_are_named_by_their_request():
    packed, _, _ = rows((1.0,) * 4)
    logits = packed.packed
    assert logits.without_non_finite() == (logits, None)
    logits.logits_NV[3, 7] = torch.nan
    finite, bad_B = logits.without_non_finite()
    assert bad_B.tolist() == [False, True, False, False]
    assert finite.logits_NV.isfinite().all()
    assert (finite.logits_NV[3] == 0).all()
    logits.logits_NV[-1, 0] = torch.inf
    assert logits.without_non_finite()[1].tolist() == [False, True, False, True]
