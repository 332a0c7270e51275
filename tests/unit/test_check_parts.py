"""Parts of the correctness kit: its statistics against SciPy, findings, watches, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from blockroll.errors import InvalidInput
from blockroll.samplers import check, draft_probs, verify_block
from blockroll.samplers.check import PRODUCTION, Finding, Sampler, Tables, Watch
from blockroll.samplers.check.chi_square import critical, needed_noncentrality, noncentral_survival, survival
from tests.law.toys import TOYS


def finding(statistic: float) -> Finding:
    return Finding(
        check="c", measure="m", statistic=statistic, threshold=1.0, found="f", detectable=0.25, power=0.99
    )


@pytest.mark.parametrize("dof", [1, 2, 31, 500])
@pytest.mark.parametrize("significance", [1e-3, 1e-6])
def test_the_chi_square_law_is_that_of_scipy(dof, significance):
    limit = critical(significance, dof)
    assert limit == pytest.approx(stats.chi2.isf(significance, dof), rel=1e-8)
    assert survival(dof / 2, dof) == pytest.approx(stats.chi2.sf(dof / 2, dof), rel=1e-10)
    noncentrality = needed_noncentrality(significance, dof)
    assert noncentral_survival(limit, dof, noncentrality) == pytest.approx(0.99, abs=1e-8)
    assert stats.ncx2.sf(limit, dof, noncentrality) == pytest.approx(0.99, abs=1e-8)


@pytest.mark.parametrize(
    ("statistic", "passed"), [(0.5, True), (1.0, True), (1.1, False), (math.inf, False), (math.nan, False)]
)
def test_a_finding_passes_up_to_its_threshold_and_never_by_a_nan(statistic, passed):
    assert finding(statistic).passed is passed
    assert finding(statistic).row()["passed"] is passed


def test_a_finding_reads_as_a_sentence_with_its_figures():
    assert str(finding(0.5)) == "pass  c: f [m 0.5, at most 1; 0.25 would be seen with power 0.99]"
    assert str(finding(2.0)).startswith("FAIL  c: f [m 2, at most 1;")


def own_randomness(draft, target_probs_BLV, uniforms_BL):
    """A verify step that brings its own coins and draws by multinomial, for one request and one draft."""
    with Watch(uniforms_BL[0].tolist()):
        coin = torch.rand(1)
        accepted = (
            coin * draft_probs(draft, 3)[0, 0, draft.token_ids_BK[0]]
            < target_probs_BLV[0, 0, draft.token_ids_BK[0]]
        )
        residual = (target_probs_BLV[0, 0] - draft_probs(draft, 3)[0, 0]).clamp(min=0)
        token = torch.multinomial(target_probs_BLV[0, 1] if accepted else residual, 1)
    return bool(accepted), int(token)


@pytest.mark.parametrize("coin", [0.1, 0.9])
@pytest.mark.parametrize("final", [0.01, 0.4, 0.99])
def test_a_sampler_with_randomness_of_its_own_follows_the_uniforms_it_is_given(coin, final):
    uniform_11 = torch.tensor([[0.9]], dtype=torch.float64)
    draft = PRODUCTION.draw_draft(torch.tensor([[[0.0, 1.0, 2.0]]]), torch.ones(1), uniform_11)
    target = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]], dtype=torch.float64)
    uniforms = torch.tensor([[coin, final]], dtype=torch.float64)
    verdict = verify_block(draft, target, uniforms)
    accepted, token = own_randomness(draft, target, uniforms)
    assert accepted == (verdict.num_committed_B.item() == 2)
    assert token == verdict.token_ids_BL[0, int(accepted)]


def test_a_watch_sees_what_is_compared_and_summed():
    weights = torch.tensor([1.0, 3.0])
    with Watch() as seen:
        torch.searchsorted(weights, torch.tensor([2.0]))
        _ = weights < 2 * weights
        torch.multinomial(weights, 1)
    assert [sums.tolist() for sums in seen.cumulative] == [[1, 3], [1, 4]]
    assert [(left.tolist(), right.tolist()) for left, right in seen.compared] == [([1, 3], [2, 6])]


@pytest.mark.parametrize(
    ("uniforms", "draw", "message"),
    [
        ([0.5], lambda: torch.rand(2), "drew more than the 1 uniforms"),
        ([0.5, 0.5], lambda: torch.rand(1), "left 1 of 2 uniforms unused"),
        ([0.5], lambda: torch.multinomial(torch.ones(3), 2), "1 sample a row, not 2"),
        ([0.5], lambda: torch.empty(1).exponential_(), "draws by torch's exponential_"),
        ([0.5], lambda: torch.randn(1), "draws by torch's randn"),
    ],
)
def test_a_sampler_that_cannot_follow_its_uniforms_is_refused(uniforms, draw, message):
    with pytest.raises(InvalidInput, match=message), Watch(uniforms):
        draw()


def test_an_error_of_the_sampler_comes_through_a_watch_as_it_is():
    with pytest.raises(ZeroDivisionError), Watch([0.5]):
        _ = 1 / 0
    with Watch([0.5, 0.5], allow_unused=True):
        assert torch.rand(1).item() == 0.5


def some_tables(**changes):
    fields = {"vocab_size": 2, "target_weights": lambda h: [1, 2], "draft_weights": lambda h, i: [2, 1]}
    return Tables(**{**fields, **changes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: some_tables(vocab_size=0), "at least 1 token, got 0"),
        (lambda: some_tables(temperature=-1), "temperature of tables must be at least 0, got -1"),
        (
            lambda: some_tables(target_weights=lambda h: [1, 2, 3]).target_V(()),
            r"target row \(\) must be 2 finite",
        ),
        (
            lambda: some_tables(draft_weights=lambda h, i: [0, 0]).draft_V((1,), 0),
            r"draft row 0 after \(1,\) must",
        ),
        (
            lambda: check.check_sampler(PRODUCTION, TOYS["hot"], -1),
            "at least 0 drafts and 1 step, got -1 and 1",
        ),
        (
            lambda: check.check_stratified(lambda u: u, np.array([0.5, 0.4]), num_uniforms=5),
            "that sum to one",
        ),
        (
            lambda: check.check_stratified(lambda u: u, np.ones(1), num_uniforms=0),
            "n of at least 1 and a window",
        ),
        (lambda: check.check_draws([0, 1], torch.tensor([0.5, 0.5])), "2 draws fill fewer than two cells"),
        (lambda: check.check_same_law([1, 2], [1]), "3 draws fill fewer than two cells"),
        (lambda: check.check_coins([]), "no coins were recorded"),
        (lambda: check.check_redraw_uniforms(torch.rand(5)), "at least 20 redraws are needed, got 5"),
        (
            lambda: check.check_tokens(torch.zeros(3, dtype=torch.int64), torch.full((2, 2), 0.5)),
            r"tokens \(N,\) need laws \(N, V\), got \(3,\) and \(2, 2\)",
        ),
        (
            lambda: check.check_rows(PRODUCTION, torch.zeros(3), torch.zeros(2, 4), num_uniforms=5),
            r"draft logits \(V,\) and target logits \(2, V\), got \(3,\) and \(2, 4\)",
        ),
        (
            lambda: check.check_rows(
                PRODUCTION, torch.zeros(3), torch.zeros(2, 3), num_uniforms=5, temperature=0
            ),
            "temperature above 0, got 0; check greedy on tables",
        ),
        (
            lambda: check.arithmetic_of(
                Sampler(PRODUCTION.draw_draft, lambda *_: None), torch.zeros(3), torch.zeros(3)
            ),
            "fill in an Arithmetic by hand",
        ),
    ],
)
def test_what_cannot_be_checked_is_refused_with_what_was_given_and_what_is_allowed(call, message):
    with pytest.raises(InvalidInput, match=message):
        call()


def test_the_names_of_the_kit_are_sorted_and_resolve():
    constants, classes = ["PRODUCTION"], ["Arithmetic", "Coin", "Finding", "Sampler", "Tables", "Watch"]
    assert check.__all__ == [*constants, *classes, *sorted(set(check.__all__) - {*constants, *classes})]
    assert all(getattr(check, name) is not None for name in check.__all__)
