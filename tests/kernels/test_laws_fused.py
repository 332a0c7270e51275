"""The law of the sampler's kernels, interpreted: integrated exactly on tables, and by uniforms in order.

Weights are float32 and their sums float64, so laws hold to 1e-6 of a probability, not to 1e-12.
"""

import pytest
import torch

from blockroll.kernels.block_verify import fused
from blockroll.kernels.choice import using
from blockroll.samplers import check, draw_draft, verify_block
from blockroll.samplers.check import Sampler
from blockroll.samplers.check.stratified import check_rows
from tests.kernels.planted import planted
from tests.law.toys import TOYS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what the interpreter does by NumPy

ALLOWED = 1e-6


def by_kernels(function):
    """The same function, run by Triton's kernels."""

    def run(*given):
        with using("triton"):
            return function(*given)

    return run


KERNELS = Sampler(by_kernels(draw_draft), by_kernels(verify_block))


def findings(toy, num_drafts, **options):
    yield check.check_sampler(KERNELS, TOYS[toy], num_drafts, tolerance=ALLOWED, **options)
    yield check.check_logprobs(KERNELS, TOYS[toy], num_drafts, tolerance=ALLOWED)


@pytest.mark.parametrize("toy", ["stochastic", "zeros", "argmax_draft", "cold"])
@pytest.mark.parametrize("num_drafts", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_committed_tokens_follow_the_target_law(toy, num_drafts):
    for finding in findings(toy, num_drafts):
        assert finding.passed, finding


# Of the law of one draft on a table: what is wrong, and the line of the kernels that would be.
WRONG = {
    "a coin is compared with the target alone": ("(u_ND * q_ND < p_ND) == 0", "(u_ND < p_ND) == 0"),
    "a draft stands by its own law": ("(u_ND * q_ND < p_ND) == 0", "(u_ND < q_ND) == 0"),
    "the row of the first position replaces a draft": (
        "row_N = tl.where((settles != 0) & (standing_N > 0), -1, standing_N)",
        "row_N = standing_N * 0",
    ),
    "what is left of a rejected draft is the target": (
        "column_N = tl.where(standing_N < count_N, -num_columns, num_columns - 1)",
        "column_N = tl.where(standing_N < count_N, num_columns - 1, num_columns - 1)",
    ),
    "the last coin is an accept coin": (
        "column_N = tl.where(standing_N < count_N, -num_columns, num_columns - 1)",
        "column_N = tl.where(standing_N < count_N, -num_columns, 0)",
    ),
    "one token too many is committed": (
        "committed_N = tl.where(settles != 0, 1, standing_N + 1).to(tl.int64)\n    tl.store(COMMITTED + "
        "request_N, committed_N, mask=is_drawn_N)",
        "committed_N = (standing_N * 0 + 2).to(tl.int64)\n    tl.store(COMMITTED + request_N, committed_N, "
        "mask=is_drawn_N)",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_planted_faults_break_the_law(tmp_path, monkeypatch, wrong):
    made = planted(tmp_path, fused, *WRONG[wrong])
    monkeypatch.setattr(fused, "verify", made.verify)
    shared = {"is_coin_shared": True} if "coin" in wrong else {}
    try:
        found = [finding.passed for finding in findings("stochastic", 1, **shared)]
    except (AssertionError, IndexError):  # what is committed has no place in the law of the table
        return
    assert not all(found)


@pytest.mark.parametrize(
    ("vocab_size", "num_uniforms"), [(600, 16), pytest.param(32_000, 256, marks=pytest.mark.slow)]
)
def test_uniforms_in_order_give_every_token_its_share(vocab_size, num_uniforms):
    """Of drafts, plain rows, acceptance, residuals, extra rows, and residuals without mass."""
    generator = torch.Generator().manual_seed(vocab_size)
    target_2V = torch.randn((2, vocab_size), generator=generator) * 2
    draft_V = target_2V[0] + torch.randn(vocab_size, generator=generator) * 0.7
    for finding in check_rows(KERNELS, draft_V, target_2V, num_uniforms=num_uniforms):
        assert finding.passed, finding
