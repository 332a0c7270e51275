"""The law of the sampler's kernels, interpreted: integrated exactly on tables, and by uniforms in order.

Tables are float64, so their laws hold to 1e-12. Weights of float32 logits are float32: closed forms of large
vocabularies are held to 1e-5 of total variation, as those of the definition are.

Shapes: V vocabulary.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from blockroll.kernels.block_verify import fused
from blockroll.kernels.choice import using
from blockroll.kernels.rows import LogitRows
from blockroll.kernels.rows.fused_draw import ask
from blockroll.kernels.rows.fused_laws import tiled
from blockroll.kernels.rows.fused_sources import source_of
from blockroll.samplers import check, draw_draft, verify_block
from blockroll.samplers.check import Arithmetic, Sampler, check_closed_form, check_stratified
from blockroll.samplers.check.stratified import check_rows
from blockroll.types import Draft
from tests.kernels.planted import planted
from tests.law.toys import TOYS, rows

ALLOWED = 1e-12


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


QUICK = {("zeros", 1), ("four_tokens", 0)}


@pytest.mark.parametrize(
    ("toy", "num_drafts"),
    [
        pytest.param(toy, number, marks=[pytest.mark.slow] * ((toy, number) not in QUICK))
        for toy in TOYS
        for number in (0, 1, 2)
    ],
)
def test_committed_tokens_follow_the_target_law(toy, num_drafts):
    """In the lowest and in the highest corner of every cell."""
    for finding in findings(toy, num_drafts):
        assert finding.passed, finding


@pytest.mark.slow
@pytest.mark.parametrize("toy", ["zeros", "opposite", "argmax_draft"])
def test_steps_behind_each_other_follow_the_target_law(toy):
    finding = check.check_sampler(KERNELS, TOYS[toy], 2, num_steps=2, length=4, tolerance=ALLOWED)
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


@pytest.mark.parametrize(
    "wrong",
    [pytest.param(name, marks=[pytest.mark.slow] * (place > 0)) for place, name in enumerate(WRONG)],
)
def test_planted_faults_break_the_law(tmp_path, monkeypatch, wrong):
    made = planted(tmp_path, fused, *WRONG[wrong])
    monkeypatch.setattr(fused, "verify", made.verify)
    shared = {"is_coin_shared": True} if wrong == "the last coin is an accept coin" else {}
    try:
        is_right = all(finding.passed for finding in findings("stochastic", 1, **shared))
    except (AssertionError, IndexError):  # what is committed has no place in the law of the table
        return
    assert not is_right


@pytest.mark.parametrize(
    ("vocab_size", "num_uniforms"),
    [
        (500, 12),
        pytest.param(600, 64, marks=pytest.mark.slow),
        pytest.param(32_000, 256, marks=pytest.mark.slow),
    ],
)
def test_uniforms_in_order_give_every_token_its_share(vocab_size, num_uniforms):
    """Of drafts, plain rows, acceptance, residuals, extra rows, and residuals without mass."""
    for finding in check_rows(KERNELS, *rows(vocab_size), num_uniforms=num_uniforms):
        assert finding.passed, finding


def probs_of_all(logits_V: Tensor, temperature: float) -> Tensor:
    """Probabilities by the kernels' own arithmetic, float64 (V,): a row read once, asked for every id."""
    size, temperature_1 = len(logits_V), torch.tensor([temperature], dtype=torch.float64)
    source = source_of(LogitRows(logits_V[None, None], temperature_1, False))
    known = tiled(source)
    everywhere = {name: getattr(known, name).expand(size, *getattr(known, name).shape[1:]) for name in NAMES}
    many = replace(
        source,
        shape=(size, 1, size),
        at_BL=source.at_BL.expand(size, 1).contiguous(),
        temperature_B=temperature_1.expand(size).contiguous(),
    )
    probs_V1 = torch.empty((size, 1), dtype=torch.float64)
    ask(many, replace(known, **everywhere).contiguous(), torch.arange(size)[:, None], probs_V1)
    return probs_V1[:, 0]


NAMES = ("top_BLT", "factor_BLT", "mass_BLT", "edge_BL", "last_BL", "fault_BL")


@pytest.mark.parametrize("size", [600, pytest.param(32_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_law_of_a_committed_token_in_closed_form(size, temperature):
    """Draft, acceptance and residual by probabilities of the kernels, against the float64 softmax."""
    draft_V, (target_V, _) = rows(size)
    with using("triton"):
        q_V, p_V = probs_of_all(draft_V, temperature), probs_of_all(target_V, temperature)
    arithmetic = Arithmetic(
        draft_cumulative_V=q_V.cumsum(0),
        accept_V=(p_V / q_V).clamp(max=1),
        final_cumulative_V=(p_V - q_V).clamp(min=0).cumsum(0),
    )
    finding = check_closed_form(arithmetic, target_V, temperature=temperature)
    assert finding.passed, finding
    rough = replace(arithmetic, final_cumulative_V=p_V.cumsum(0))
    assert not check_closed_form(rough, target_V, temperature=temperature).passed


@pytest.mark.parametrize(
    ("size", "num_uniforms"), [(500, 48), pytest.param(32_000, 200, marks=pytest.mark.slow)]
)
def test_uniforms_in_order_replace_drafts_of_float32_rows(size, num_uniforms):
    """A draft that is surely rejected: what replaces it comes from the residual of two rows of logits."""
    draft_V, target_2V = rows(size)
    probs_V, drafted_V = target_2V[0].double().softmax(-1), draft_V.double().softmax(-1)
    token, left_V = int((probs_V - drafted_V).argmin()), (probs_V - drafted_V).clamp(min=0)

    def draw(uniforms: Tensor) -> Tensor:
        count = len(uniforms)
        draft = Draft(
            token_ids_BK=torch.full((count, 1), token),
            law=LogitRows(draft_V.expand(count, 1, -1), torch.ones(count).double(), False),
            num_drafts_B=torch.ones(count, dtype=torch.int64),
        )
        target = LogitRows(target_2V.expand(count, -1, -1), torch.ones(count).double(), False)
        coins_N2 = torch.stack([torch.full_like(uniforms, 1 - 2**-53), uniforms], dim=1)
        with using("triton"):
            return verify_block(draft, target, coins_N2).token_ids_BL[:, 0]

    finding = check_stratified(draw, left_V / left_V.sum(), num_uniforms=num_uniforms)
    assert finding.passed, finding
