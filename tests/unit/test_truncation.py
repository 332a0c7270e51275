"""Truncation finds the tokens that stay without sorting all: the same, ties included, as a whole sort finds.

Shapes: B requests, L rows, V vocabulary.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blockroll.kernels.rows import LogitRows, Mix, logit_rows, mixed_logits, target_probs, truncation
from blockroll.kernels.rows.truncation import Cut, truncate
from blockroll.kernels.rows.weights import inverse_cdf
from blockroll.samplers.laws import Laws
from blockroll.samplers.text import Text
from blockroll.types import Sampling

OFF = (0, 1.0, 0.0)
CUTS = [
    (50, 1.0, 0.0),
    (1000, 1.0, 0.0),
    (4000, 1.0, 0.0),
    (9999, 1.0, 0.0),
    (0, 0.95, 0.0),
    (0, 1 - 1e-9, 0.0),
    (0, 1e-9, 0.0),
    (0, 1.0, 0.05),
    (0, 1.0, 1.0),
    (7, 0.9, 0.2),
    (0, 0.5, 0.3),
]


def cut_of(*options: tuple[float, float, float]) -> Cut:
    return Cut(*torch.tensor(options, dtype=torch.float64).unbind(dim=1))


def by_a_whole_sort(probs_BLV: Tensor, cut: Cut) -> Tensor:
    """The rule, token by token: from the best on, of equals from the lowest id on."""
    kept = torch.zeros_like(probs_BLV)
    for b, (top_k, top_p, min_p) in enumerate(zip(*(each.tolist() for each in cut[:3]), strict=True)):
        for probs_V, kept_V in zip(probs_BLV[b], kept[b], strict=True):
            ranked = sorted((-p, token) for token, p in enumerate(probs_V.tolist()))
            order = [token for _, token in ranked][: int(top_k) or len(ranked)]
            mass, before = probs_V[order].sum().item(), 0.0
            for token in order:
                p = probs_V[token].item()
                if p == 0 or (top_p < 1 and before >= top_p * mass) or p < min_p * probs_V.max().item():
                    break
                kept_V[token], before = p, before + p
        if (top_k, top_p, min_p) != OFF:
            kept[b] /= kept[b].sum(dim=-1, keepdim=True)
        else:
            kept[b] = probs_BLV[b]
    return kept


def assert_same_law(ours: Tensor, theirs: Tensor) -> None:
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 30.0])
@pytest.mark.parametrize("options", CUTS, ids=str)
def test_a_wide_row_keeps_what_a_whole_sort_keeps(options, spread):
    """Flat rows, whose mass all tokens hold, and rows of which a token holds all; with ties, and without."""
    generator = torch.Generator().manual_seed(3)
    logits_1LV = torch.randn(1, 2, 5003, generator=generator, dtype=torch.float64) * spread
    logits_1LV[0, 1] = (logits_1LV[0, 1] * 2).round() / 2
    probs = logits_1LV.softmax(dim=-1)
    assert_same_law(truncate(probs, cut_of(options)), by_a_whole_sort(probs, cut_of(options)))


def test_requests_of_a_batch_are_each_cut_by_their_own_options():
    logits_BLV = torch.randn(len(CUTS) + 1, 2, 3001, generator=torch.Generator().manual_seed(4)) * 3
    probs, cut = logits_BLV.double().softmax(dim=-1), cut_of(*CUTS, OFF)
    ours = truncate(probs, cut)
    assert_same_law(ours, by_a_whole_sort(probs, cut))
    assert torch.equal(ours[-1], probs[-1])


@pytest.mark.parametrize("options", CUTS, ids=str)
def test_a_plain_step_has_no_draft_rows_to_cut(options):
    no_rows = torch.empty(2, 0, 3001, dtype=torch.float64)
    assert truncate(no_rows, cut_of(options, OFF)).shape == no_rows.shape


def test_a_plain_step_of_a_large_vocabulary_draws_from_what_is_kept():
    texts = [Text(sampling=Sampling(top_k=3), prompt_ids=(1,), token_ids=[]) for _ in range(2)]
    laws = Laws.of(texts, vocab_size=3001, device=torch.device("cpu"))
    logits_B1V = torch.randn(2, 1, 3001, generator=torch.Generator().manual_seed(6))
    nothing_B0, none_B = torch.empty(2, 0, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    draft = laws.draw(torch.empty(2, 0, 3001), nothing_B0, none_B)
    assert draft.token_ids_BK.shape == (2, 0)
    target = laws.target_rows(logits_B1V, draft.token_ids_BK, torch.empty(2, 0, 3001), none_B)
    assert ((target.probs_BLV > 0).sum(dim=-1) == 3).all()


def test_a_row_of_which_a_constraint_left_few_tokens_keeps_no_other():
    logits_11V = torch.full((1, 1, 3001), -math.inf, dtype=torch.float64)
    logits_11V[..., [7, 19, 2000]] = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    probs = logits_11V.softmax(dim=-1)
    for options in CUTS:
        assert_same_law(truncate(probs, cut_of(options)), by_a_whole_sort(probs, cut_of(options)))
    assert truncate(probs, cut_of((2, 1.0, 0.0))).nonzero()[:, -1].tolist() == [7, 19]


SHARE = st.floats(0.01, 1.0)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    weights=st.lists(st.integers(0, 4), min_size=1, max_size=40).filter(any),
    top_k=st.integers(0, 45),
    top_p=st.one_of(st.just(1.0), SHARE.map(lambda p: min(1.0, p + 1e-4 * math.pi))),
    min_p=st.one_of(st.just(0.0), SHARE),
)
def test_whatever_the_row_and_the_options(weights, top_k, top_p, min_p):
    probs = torch.tensor([[weights]], dtype=torch.float64)
    probs /= probs.sum()
    cut = cut_of((top_k, top_p, min_p))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truncation, "_FEW", 0)  # small rows are looked through as wide ones are
        found = truncate(probs, cut)
    expected = probs if (top_k, top_p, min_p) == OFF else by_a_whole_sort(probs, cut)
    assert_same_law(found, expected)


@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("options", [None, (50, 1.0, 0.0), (0, 0.9, 0.0), (20, 0.9, 0.1)], ids=str)
def test_rows_judged_a_tile_at_a_time_are_those_of_all_rows_at_once(monkeypatch, options, is_mixed):
    monkeypatch.setattr(logit_rows, "_TILE", 3 * 2003)
    generator = torch.Generator().manual_seed(5)
    size, num_drafts, vocab_size = 4, 5, 2003
    logits_BLV = torch.randn(size, num_drafts + 1, vocab_size, generator=generator) * 3
    draft_BKV = torch.randn(size, num_drafts, vocab_size, generator=generator) * 3
    temperature_B = torch.tensor([1.0, 0.7, 0.0, 1.3], dtype=torch.float64)
    weight_B = torch.tensor([0.5, 1.0, 1.0, 0.2], dtype=torch.float64)
    num_drafts_B = torch.tensor([5, 3, 5, 2])
    cut = None if options is None else cut_of(options, options, options, OFF)
    lean = LogitRows(
        logits_BLV, temperature_B, True, cut, Mix(draft_BKV, weight_B, num_drafts_B) if is_mixed else None
    )
    logits = mixed_logits(logits_BLV, draft_BKV, weight_B, num_drafts_B) if is_mixed else logits_BLV
    probs = target_probs(logits, temperature_B)
    if cut is not None:
        probs = by_a_whole_sort(probs, cut)
    torch.testing.assert_close(lean.dense(), probs, rtol=0, atol=1e-14)
    token_ids_BL = torch.randint(vocab_size, (size, num_drafts + 1), generator=generator)
    own = probs.gather(-1, token_ids_BL[..., None]).squeeze(-1)
    torch.testing.assert_close(lean.probs_of(token_ids_BL), own, rtol=0, atol=1e-14)
    for offsets in ([0, 1, 2, 3], [5, 5, 5, 5], [4, 3, 0, 2]):
        for place in ((torch.arange(size), torch.tensor(offsets)), (torch.tensor([2, 0, 2]), [5, 1, 0])):
            place = tuple(map(torch.as_tensor, place))
            torch.testing.assert_close(lean.at(*place), probs[place], rtol=0, atol=1e-14)
    uniforms_BL = torch.rand(token_ids_BL.shape, generator=generator, dtype=torch.float64)
    assert torch.equal(lean.drawn(uniforms_BL)[0], inverse_cdf(probs, uniforms_BL))
    rest = lean.behind_first()
    torch.testing.assert_close(rest.dense(), probs[:, 1:], rtol=0, atol=1e-14)
