"""Rows of a large vocabulary as weights: the law reported is the law drawn from, whoever is beside it.

Shapes: B requests, K drafted tokens, L = K + 1 rows, N rows, V vocabulary.
"""

from dataclasses import replace

import pytest
import torch

from blockroll.kernels.rows import At, LogitRows, logit_rows, target_probs
from blockroll.kernels.rows.truncation import Cut, truncate
from blockroll.kernels.rows.weights import Weights, drawn_from
from blockroll.samplers import draw_draft, settle_first, verify_block
from blockroll.types import POINT_MASS, Draft

VOCAB = 20_011  # large, and not a whole number of blocks
OFF = (0.0, 1.0, 0.0)
CUTS = [(50.0, 1.0, 0.0), (0.0, 0.9, 0.0), (0.0, 1.0, 0.05), (40.0, 0.9, 0.1), (0.0, 0.99, 0.01)]


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def code(request, monkeypatch):
    """By both: compiled code serves float32 rows alone, where there is a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(logit_rows, "rows_library", lambda: None)


def logits_of(*shape: int, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    return spread * torch.randn(*shape, VOCAB, generator=torch.Generator().manual_seed(seed))


def coins_of(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cut_of(*options: tuple[float, float, float]) -> Cut:
    return Cut(*torch.tensor(options, dtype=torch.float64).unbind(dim=1))


def temperatures(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def every_row(law: LogitRows) -> Weights:
    size, num_rows, _ = law.shape
    requests, offsets = torch.meshgrid(torch.arange(size), torch.arange(num_rows), indexing="ij")
    return law.weights_at(requests.flatten(), offsets.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [None, OFF, *CUTS], ids=str)
@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 20.0])
def test_a_uniform_inside_the_interval_of_a_token_draws_it_and_its_share_is_its_probability(
    spread, options, dtype
):
    cut = None if options is None else cut_of(options, options)
    law = LogitRows(logits_of(2, 1, spread=spread).to(dtype), temperatures(0.7, 1.0), False, cut)
    weights, probs_NV = every_row(law), law.dense()[:, 0]
    torch.testing.assert_close(probs_NV.sum(dim=-1), torch.ones(2).double(), rtol=0, atol=1e-12)
    high_NV = probs_NV.cumsum(dim=-1)
    for share in (0.02, 0.5, 0.98):
        for _ in range(5):
            ids_N = probs_NV.multinomial(1).squeeze(1)
            own_N, high_N = (each.gather(1, ids_N[:, None]).squeeze(1) for each in (probs_NV, high_NV))
            drawn = weights.draw(high_N - share * own_N)
            assert torch.equal(drawn.token_ids_B, ids_N)
            torch.testing.assert_close(drawn.high_B, high_N, rtol=0, atol=1e-12)
            torch.testing.assert_close(drawn.low_B, high_N - own_N, rtol=0, atol=1e-12)
            torch.testing.assert_close(drawn.mass_B, torch.ones_like(own_N), rtol=0, atol=1e-12)
            assert torch.equal(weights.probs_of(ids_N[:, None]).squeeze(1), own_N)


@pytest.mark.parametrize("uniform", [2.0**-53, 1e-12, 0.5, 1 - 1e-12, 1 - 2.0**-53])
@pytest.mark.parametrize("ids", [[0], [VOCAB - 1], [5, 127, 128, 19_999], [256, 20_008, 20_010]], ids=str)
def test_no_token_without_weight_is_drawn_by_blocks(ids, uniform):
    weights_1V = torch.zeros(1, VOCAB)
    weights_1V[0, ids] = torch.tensor([1e-38, 1.0, 3.0, 1e-20])[: len(ids)]
    drawn = Weights.normalized(weights_1V).draw(torch.tensor([uniform], dtype=torch.float64))
    assert drawn.token_ids_B.item() in ids
    whole = drawn_from(weights_1V.double(), temperatures(uniform))
    assert torch.equal(drawn.token_ids_B, whole.token_ids_B)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
def test_float32_weights_are_the_softmax_within_their_rounding(temperature):
    logits_11V = logits_of(1, 1, spread=4.0)
    law = LogitRows(logits_11V, temperatures(temperature), False)
    exact = target_probs(logits_11V, temperatures(temperature))
    assert (law.dense() - exact).abs().sum() / 2 < 1e-6
    torch.testing.assert_close(law.dense(), exact, rtol=1e-5, atol=1e-30)
    ids_11 = logits_11V.argmin(dim=-1)
    exact_11 = (logits_11V.double() / temperature).log_softmax(dim=-1).gather(-1, ids_11[..., None])
    first = At(torch.tensor([0]), torch.tensor([0]))
    torch.testing.assert_close(law.logprobs_at(first, ids_11[0]), exact_11[0, :, 0], rtol=0, atol=1e-6)


def test_the_law_of_a_row_does_not_depend_on_the_rows_beside_it():
    logits_BLV = logits_of(5, 3)
    temperature_B = temperatures(1.0, 0.7, 0.0, 1.3, 1.0)
    cut = cut_of(OFF, (50.0, 1.0, 0.0), OFF, (0.0, 0.9, 0.0), (0.0, 0.9, 0.0))
    together = LogitRows(logits_BLV, temperature_B, True, cut).dense()
    for b in range(5):
        alone = LogitRows(
            logits_BLV[b : b + 1], temperature_B[b : b + 1], b == 2, cut.of(slice(b, b + 1))
        ).dense()[0]
        torch.testing.assert_close(alone, together[b], rtol=0, atol=1e-15)
        assert torch.equal(alone > 0, together[b] > 0)
    assert torch.equal(together[2].argmax(dim=-1), logits_BLV[2].argmax(dim=-1))
    assert (together[2].amax(dim=-1) == 1).all()


@pytest.mark.parametrize("options", CUTS, ids=str)
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_float32_weights_keep_the_tokens_that_a_whole_row_keeps(options, spread):
    logits_BLV, temperature_B = logits_of(3, 2, spread=spread), temperatures(1.0, 0.7, 1.0)
    law = LogitRows(logits_BLV, temperature_B, False, cut_of(options, OFF, options))
    kept = truncate(replace(law, cut=None).dense(), cut_of(options, OFF, options))
    assert torch.equal(law.dense() > 0, kept > 0)
    torch.testing.assert_close(law.dense(), kept, rtol=0, atol=1e-12)


def peaked(size: int) -> torch.Tensor:
    """Logits whose best tokens are likely."""
    return logits_of(size, 4, spread=5.0)


def drafted(num_drafts_B: torch.Tensor) -> Draft:
    """By laws near the target's, so that many stand."""
    size, num_drafts = len(num_drafts_B), 3
    logits_BKV = peaked(size)[:, :num_drafts] + logits_of(size, num_drafts, spread=0.4, seed=7)
    return draw_draft(logits_BKV, torch.ones(size).double(), coins_of(size, num_drafts), num_drafts_B)


def test_drafts_know_their_probabilities_and_others_are_read_from_their_rows():
    draft = drafted(torch.tensor([3, 3]))
    fresh = replace(draft.law, known=None)
    assert torch.equal(draft.law.probs_of(draft.token_ids_BK), fresh.probs_of(draft.token_ids_BK))
    others_BK = draft.token_ids_BK.roll(1, dims=1)
    assert torch.equal(draft.law.probs_of(others_BK), fresh.probs_of(others_BK))
    rest = draft.behind_first()
    assert torch.equal(rest.law.probs_of(rest.token_ids_BK), fresh.behind_first().probs_of(rest.token_ids_BK))


@pytest.mark.parametrize("rule", [verify_block, settle_first])
@pytest.mark.parametrize("certain", [False, True])
def test_verifying_row_by_row_commits_what_verifying_all_rows_at_once_commits(monkeypatch, rule, certain):
    size = 24
    draft = drafted(torch.arange(size) % 4)
    if certain:
        draft = replace(draft, law=POINT_MASS, token_ids_BK=peaked(size)[:, :3].argmax(dim=-1))
    coins = coins_of(size, 4 if rule is verify_block else 2, seed=3)
    lean = rule(draft, LogitRows(peaked(size), torch.ones(size).double(), False), coins)
    monkeypatch.setattr(logit_rows, "_WIDE", VOCAB + 1)
    draft = draft if certain else replace(draft, law=draft.law.dense())
    whole = rule(draft, LogitRows(peaked(size), torch.ones(size).double(), False), coins)
    assert torch.equal(lean.num_committed_B, whole.num_committed_B)
    assert lean.num_accepted_B.float().mean() > 0.3
    is_ours_BL = torch.arange(lean.token_ids_BL.shape[1]) < lean.num_committed_B[:, None]
    assert torch.equal(lean.token_ids_BL[is_ours_BL], whole.token_ids_BL[is_ours_BL])
    assert torch.equal(lean.is_draft_BL[is_ours_BL], whole.is_draft_BL[is_ours_BL])
    torch.testing.assert_close(
        lean.behavior_logprobs_BL[is_ours_BL], whole.behavior_logprobs_BL[is_ours_BL], rtol=0, atol=1e-5
    )
