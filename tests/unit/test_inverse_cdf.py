"""Inverse-CDF draws: exact counts, never an id without weight; and the corners of drafting and verifying.

Shapes: B rows, K drafted tokens, L = K + 1 target positions, V vocabulary, N uniforms.
"""

import pytest
import torch

from blockroll.kernels.rows.weights import inverse_cdf
from blockroll.samplers import draft_probs, draw_draft, target_probs, verify_block
from blockroll.types import POINT_MASS, Draft, Verdict

EXTREME_UNIFORMS = [2.0**-53, 1e-12, 0.5, 1 - 1e-12, 1 - 2.0**-53]

# Floats of every size, zeros scattered and at both ends.
WEIGHTS = {
    "one_id": [1.0],
    "one_id_tiny": [1e-300],
    "two_ids": [1.0, 1.0],
    "first_is_zero": [0.0, 3.0],
    "last_is_zero": [3.0, 0.0],
    "zeros_all_around": [0.0, 0.0, 2.0, 0.0, 1.0, 0.0, 0.0],
    "tail_below_rounding": [1.0, 1e-30, 0.0],
    "head_below_rounding": [1e-30, 1.0, 0.0],
    "thirds": [1 / 3, 1 / 3, 1 / 3, 0.0],
    "tenths": [0.1] * 10 + [0.0],
    # Times the uniform, the only weight rounds to nothing or to itself.
    "smallest_float": [0.0, 5e-324, 0.0],
}


def _wide_weights(kind: str, size: int = 257) -> torch.Tensor:
    """Float64 weights over an odd vocabulary that ends in ids without weight."""
    generator = torch.Generator().manual_seed(7)
    weights_V = torch.rand(size, dtype=torch.float64, generator=generator)
    if kind == "sparse":
        weights_V[torch.rand(size, generator=generator) < 0.8] = 0
    if kind == "skewed":
        weights_V = weights_V**40
    weights_V[0] = 0
    weights_V[-3:] = 0
    return weights_V


def _stratified(num_uniforms: int) -> torch.Tensor:
    return (torch.arange(num_uniforms, dtype=torch.float64) + 0.5) / num_uniforms


def _one_step(
    draft_V: list[float],
    drafted: int,
    target_LV: list[list[float]],
    uniforms_N: torch.Tensor,
    coin: float = 1 - 2.0**-53,
) -> Verdict:
    """Verify one draft under N final uniforms."""
    rows = len(uniforms_N)
    draft = Draft(
        token_ids_BK=torch.full((rows, 1), drafted),
        law=torch.tensor([[draft_V]], dtype=torch.float64).expand(rows, -1, -1),
        num_drafts_B=torch.ones(rows, dtype=torch.int64),
    )
    target_BLV = torch.tensor([target_LV], dtype=torch.float64).expand(rows, -1, -1)
    coin_N = torch.full_like(uniforms_N, coin)
    return verify_block(draft, target_BLV, torch.stack([coin_N, uniforms_N], dim=1))


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("uniform", EXTREME_UNIFORMS)
def test_an_id_without_weight_is_never_drawn(weights, uniform):
    weights_V = torch.tensor(weights, dtype=torch.float64)
    token = inverse_cdf(weights_V, torch.tensor(uniform, dtype=torch.float64)).item()
    assert weights[token] > 0


@pytest.mark.parametrize("kind", ["dense", "sparse", "skewed"])
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_an_id_without_weight_is_never_drawn_from_a_wide_vocabulary(kind, scale):
    weights_V = _wide_weights(kind) * scale
    uniforms_N = torch.cat([_stratified(4001), torch.tensor(EXTREME_UNIFORMS, dtype=torch.float64)])
    token_N = inverse_cdf(weights_V.expand(len(uniforms_N), -1), uniforms_N)
    assert token_N.dtype == torch.int64
    assert (weights_V[token_N] > 0).all()


def test_the_extreme_uniforms_draw_the_first_and_the_last_id_with_weight():
    weights_2V = torch.tensor(WEIGHTS["zeros_all_around"], dtype=torch.float64).expand(2, -1)
    uniforms = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    assert inverse_cdf(weights_2V, uniforms).tolist() == [2, 4]


@pytest.mark.parametrize("kind", ["dense", "sparse", "skewed"])
@pytest.mark.parametrize("num_uniforms", [1, 300, 2000])
@pytest.mark.parametrize("scale", [1.0, 0.001, 640.0])
def test_stratified_uniforms_count_every_id_to_within_one_even_unnormalised(kind, num_uniforms, scale):
    weights_V = _wide_weights(kind) * scale
    token_N = inverse_cdf(weights_V.expand(num_uniforms, -1), _stratified(num_uniforms))
    counts_V = torch.bincount(token_N, minlength=len(weights_V))
    expected_V = num_uniforms * weights_V / weights_V.sum()
    assert (counts_V - expected_V).abs().max() <= 1


def test_a_uniform_on_a_boundary_belongs_to_the_next_id_with_weight():
    weights_V = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    assert inverse_cdf(weights_V, torch.tensor(0.5, dtype=torch.float64)).item() == 2


def test_every_row_is_drawn_from_its_own_weights_by_its_own_uniform():
    weights = torch.tensor([[[1, 0, 1], [0, 2, 2]], [[5, 5, 0], [0, 0, 3]]], dtype=torch.float64)
    uniforms = torch.tensor([[0.4, 0.6], [0.6, 0.1]], dtype=torch.float64)
    assert inverse_cdf(weights, uniforms).tolist() == [[0, 2], [1, 2]]


def test_a_rejection_without_residual_draws_from_the_target():
    """Rounding put the draft's law above the target at the drafted id and nowhere below it: no residual."""
    above = 0.5 * (1 + 2.0**-51)
    verdict = _one_step([above, 0.5, 0.0], 0, [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], _stratified(100))
    assert (verdict.num_accepted_B == 0).all()
    assert torch.bincount(verdict.token_ids_BL[:, 0], minlength=3).tolist() == [50, 50, 0]


def test_an_equal_law_is_accepted_by_the_largest_coin():
    verdict = _one_step([0.25, 0.75], 1, [[0.25, 0.75], [0.5, 0.5]], _stratified(10))
    assert (verdict.num_accepted_B == 1).all()
    assert torch.bincount(verdict.token_ids_BL[:, 1], minlength=2).tolist() == [5, 5]


def test_a_draft_without_target_weight_is_rejected_even_if_its_coin_underflows():
    verdict = _one_step([5e-324, 1.0], 0, [[0.0, 1.0], [1.0, 0.0]], _stratified(4), coin=2.0**-53)
    assert (verdict.num_accepted_B == 0).all()
    assert (verdict.token_ids_BL[:, 0] == 1).all()


def test_a_rejected_draft_never_comes_back_from_the_residual():
    verdict = _one_step([0.5, 0.25, 0.25], 0, [[0.25, 0.5, 0.25], [0.0, 0.0, 1.0]], _stratified(100))
    assert (verdict.num_accepted_B == 0).all()
    assert (verdict.token_ids_BL[:, 0] == 1).all()


def test_ties_of_a_greedy_row_go_to_the_lowest_id():
    logits_BLV = torch.tensor([[[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0]]])
    probs = target_probs(logits_BLV, torch.zeros(1))
    assert probs.tolist() == [[[0, 1, 0, 0], [1, 0, 0, 0]]]
    assert probs.dtype == torch.float64


def test_an_argmax_draft_is_the_lowest_best_id_whatever_its_uniform():
    logits_BKV = torch.tensor([[[1.0, 5.0, 5.0]]]).expand(5, -1, -1)
    uniforms_BK = torch.tensor(EXTREME_UNIFORMS, dtype=torch.float64)[:, None]
    draft = draw_draft(logits_BKV, torch.zeros(5), uniforms_BK)
    assert draft.token_ids_BK.flatten().tolist() == [1] * 5
    assert draft.law is POINT_MASS
    assert (draft_probs(draft, 3) == torch.tensor([0.0, 1.0, 0.0])).all()


def test_greedy_and_sampled_rows_share_a_batch_without_touching_each_other():
    logits_BLV = torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(2))
    temperature_B = torch.tensor([0.0, 1.3, 0.0])
    batched = target_probs(logits_BLV, temperature_B)
    for row in range(3):
        one = slice(row, row + 1)
        alone = target_probs(logits_BLV[one], temperature_B[one])
        torch.testing.assert_close(batched[one], alone, atol=1e-12, rtol=0)
    assert logits_BLV[0].argmax(dim=-1).tolist() == batched[0].argmax(dim=-1).tolist()
