"""Tails: what 24-bit uniforms and float32 sums lose, at real vocabularies and by exact counts.

A token at logit gap 20.5 has probability 1.25e-9, far below 2^-24; 262,144 of them are 3.3e-4 of the mass.
Samplers whose exponentials or uniforms end at 24 bits draw too few of them, or none (vLLM #43150, #34854).

Shapes: B rows, L target positions, V vocabulary, N uniforms.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from blockroll.kernels.rows.weights import inverse_cdf
from blockroll.samplers import draw_draft, target_probs, verify_block
from blockroll.samplers.check import check_stratified, stratified
from blockroll.samplers.uniforms import u52
from blockroll.types import Draft

TAIL, GAP = 262_144, 20.5
_MASK = 0xFFFFFFFF
# Every pair of extreme words, and uniforms beside both ends.
EXTREMES = [
    *u52(torch.tensor([0, 0, _MASK, _MASK]), torch.tensor([0, _MASK, 0, _MASK])).tolist(),
    2.0**-53,
    2.0**-52,
    0.5,
    1 - 2.0**-52,
    1 - 2.0**-53,
]
SIZES = [8_193, 10_000, 151_936]


def law_with_tail(head: int) -> Tensor:
    """Production's law (V,) of one likely token at this place among the tail tokens."""
    logits_V = torch.full((TAIL + 1,), -GAP)
    logits_V[head] = 0
    return target_probs(logits_V[None, None], torch.ones(1))[0, 0]


def draw(
    law_V: Tensor, *, bits: int | None = None, dtype: torch.dtype = torch.float64
) -> Callable[[Tensor], Tensor]:
    """Production's draw, or the same with uniforms of fewer bits or narrower sums."""

    def tokens(uniforms: Tensor) -> Tensor:
        if bits is not None:
            uniforms = (uniforms * 2.0**bits).floor() / 2.0**bits
        return inverse_cdf(law_V.to(dtype), uniforms.to(dtype))

    return tokens


@pytest.mark.failure(86)
@pytest.mark.parametrize("head", [0, TAIL // 3, TAIL], ids=["first", "inside", "last"])
def test_a_tail_beyond_24_bits_is_hit_at_its_rate(head):
    law_V = law_with_tail(head)
    expected = 100_000 * (1 - law_V[head].item())
    assert expected == pytest.approx(32.76, abs=0.01)
    hits = (draw(law_V)(stratified(100_000)) != head).sum().item()
    assert abs(hits - expected) <= 2  # on either side of the head by less than one
    assert check_stratified(draw(law_V), law_V, num_uniforms=100_000).passed


@pytest.mark.failure(86)
def test_each_of_the_tail_tokens_is_hit_as_often_as_the_others():
    law_V = law_with_tail(0)
    tail = (law_V[0].item(), 1.0)
    counts = torch.bincount(draw(law_V)(stratified(4 * TAIL, *tail)), minlength=TAIL + 1)
    assert counts[1:].min() >= 3
    assert counts[1:].max() <= 5
    assert check_stratified(draw(law_V), law_V, num_uniforms=4 * TAIL, window=tail).passed


@pytest.mark.failure(88)
@pytest.mark.failure(87)
@pytest.mark.parametrize(
    ("fault", "reached"),
    [({"bits": 24}, 6_000), ({"dtype": torch.float32}, 12_000)],
    ids=["24_bits", "float32_sums"],
)
def test_uniforms_of_24_bits_and_sums_in_float32_never_reach_most_of_the_tail(fault, reached):
    law_V = law_with_tail(0)
    tail = (law_V[0].item(), 1.0)
    assert len(draw(law_V, **fault)(stratified(4 * TAIL, *tail)).unique()) < reached
    assert not check_stratified(draw(law_V, **fault), law_V, num_uniforms=4 * TAIL, window=tail).passed


def test_verify_draws_from_the_tail_too():
    law_V = law_with_tail(0)
    uniforms_N1 = stratified(8, law_V[0].item(), 1.0)[:, None]
    none = Draft(
        token_ids_BK=torch.zeros(8, 0, dtype=torch.int64),
        law=torch.zeros(8, 0, TAIL + 1, dtype=torch.float64),
        num_drafts_B=torch.zeros(8, dtype=torch.int64),
    )
    tokens_B = verify_block(none, law_V.expand(8, 1, -1), uniforms_N1).token_ids_BL[:, 0]
    # The middles of eight equal parts of the tail.
    assert tokens_B.tolist() == pytest.approx([TAIL * (i + 0.5) / 8 for i in range(8)], abs=2)


@pytest.mark.failure(42)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["all_equal", "last_three", "last", "all_but_the_padding"])
def test_extreme_uniforms_reach_the_last_ids_with_mass_and_nothing_behind_them(size, kind):
    """As a vocabulary that is padded for its kernels, or whose last ids are all there is."""
    logits_V = torch.full((size,), -torch.inf)
    span = {"all_equal": (0, size), "last_three": (size - 3, size), "last": (size - 1, size)}
    first, end = span.get(kind, (0, size - 100))
    logits_V[first:end] = 0.0
    uniforms_N = torch.tensor(EXTREMES, dtype=torch.float64)
    assert ((uniforms_N > 0) & (uniforms_N < 1)).all()
    draft = draw_draft(logits_V.expand(1, len(uniforms_N), -1), torch.ones(1), uniforms_N[None])
    tokens_N = draft.token_ids_BK[0]
    assert tokens_N.min() == first
    assert tokens_N.max() == end - 1


@pytest.mark.parametrize("size", SIZES)
def test_counts_are_exact_up_to_the_last_id_at_odd_and_padded_vocabularies(size):
    logits_V = 3 * torch.randn(size, generator=torch.Generator().manual_seed(size))
    logits_V[-5:] = 12.0
    law_V = target_probs(logits_V[None, None], torch.ones(1))[0, 0]
    finding = check_stratified(draw(law_V), law_V, num_uniforms=1_000_000)
    assert finding.passed, str(finding)


@pytest.mark.parametrize("uniform", EXTREMES)
def test_a_residual_that_is_one_id_is_drawn_by_every_uniform(uniform):
    """All but the last id have no mass left: a sum that misses the total would fall beside it."""
    size = 8_193
    draft_V = torch.full((size,), 1 / (size - 1), dtype=torch.float64)
    draft_V[-1] = 0
    target_V = 0.5 * draft_V
    target_V[-1] = 0.5
    draft = Draft(
        token_ids_BK=torch.zeros(1, 1, dtype=torch.int64),
        law=draft_V[None, None],
        num_drafts_B=torch.ones(1, dtype=torch.int64),
    )
    coins = torch.tensor([[1 - 2.0**-53, uniform]], dtype=torch.float64)
    verdict = verify_block(draft, target_V.expand(1, 2, -1), coins)
    assert verdict.token_ids_BL[0, 0] == size - 1
