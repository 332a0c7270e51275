"""Draft and verify commit tokens by the target law: integrated exactly, to 1e-12, on toy tables."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockroll.kernels.block_verify import chosen_logprobs, reference
from blockroll.samplers import draw_draft, settle_first, verify_block
from tests.law.integrate import PRODUCTION, Toy, committed_law, integrate_step, max_difference, target_law
from tests.law.mutants import MUTANTS
from tests.law.toys import TOYS

# Each mutant breaks the law of these toys at K = 2 by more than 1e-3, and of no other toy.
_SAMPLED = {"stochastic", "four_tokens", "zeros", "opposite", "argmax_draft", "hot", "cold"}
BROKEN_BY = {
    "final_from_target": _SAMPLED,
    "accept_if_target_is_larger": _SAMPLED,
    "no_cumulative_stop": _SAMPLED | {"greedy", "greedy_argmax_draft"},
    "coin_reused": _SAMPLED,
}


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
@pytest.mark.parametrize("num_drafts", [0, 1, 2, 3])
@pytest.mark.parametrize("corner", ["low", "high"])
def test_committed_tokens_follow_the_target_law(toy, num_drafts, corner):
    law = committed_law(PRODUCTION, toy, [num_drafts], num_drafts + 1, corner=corner)
    assert max_difference(law, target_law(toy, num_drafts + 1)) < 1e-12


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
@pytest.mark.parametrize(("drafts_per_step", "length"), [((1, 1), 3), ((2, 2), 4), ((1, 2), 4), ((2, 0), 3)])
def test_a_rollout_of_two_steps_cut_at_a_length_follows_the_target_law(toy, drafts_per_step, length):
    law = committed_law(PRODUCTION, toy, drafts_per_step, length)
    assert max_difference(law, target_law(toy, length)) < 1e-12


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
@pytest.mark.parametrize("num_drafts", [0, 1, 2, 3])
def test_behavior_logprobs_are_the_log_target_of_every_committed_token(toy, num_drafts):
    step = integrate_step(PRODUCTION, toy, (), num_drafts)
    for committed, logprobs_L in zip(step.committed(), step.behavior_logprobs_CL, strict=True):
        expected = [toy.target_V(committed[:i])[token] for i, token in enumerate(committed)]
        assert min(expected) > 0
        np.testing.assert_allclose(logprobs_L[: len(committed)], np.log(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_drafts", [1, 2, 3])
def test_a_draft_law_equal_to_the_target_is_always_accepted(num_drafts):
    step = integrate_step(PRODUCTION, TOYS["identical"], (), num_drafts)
    assert (step.num_accepted_C == num_drafts).all()


@pytest.mark.parametrize("num_drafts", [1, 2, 3])
def test_a_draft_the_target_cannot_take_is_always_rejected(num_drafts):
    step = integrate_step(PRODUCTION, TOYS["disjoint"], (), num_drafts)
    assert (step.num_accepted_C == 0).all()


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_the_first_draft_is_accepted_with_the_overlap_of_the_two_laws(toy):
    step = integrate_step(PRODUCTION, toy, (), 1)
    overlap = np.minimum(toy.target_V(()), toy.draft_V((), 0)).sum()
    assert step.volume_C @ step.num_accepted_C == pytest.approx(overlap, abs=1e-12)


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
@pytest.mark.parametrize("num_drafts", [0, 1, 2])
def test_cells_fill_the_uniforms_and_the_verdict_is_constant_inside_each(toy, num_drafts):
    low, high = (integrate_step(PRODUCTION, toy, (), num_drafts, corner=corner) for corner in ("low", "high"))
    assert low.volume_C.sum() == pytest.approx(1, abs=1e-12)
    assert low.committed() == high.committed()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_breaks_the_law_of_the_toys_it_must_break(name):
    broken = set()
    for toy_name, toy in TOYS.items():
        law = committed_law(MUTANTS[name], toy, [2], 3, is_coin_shared=name == "coin_reused")
        if max_difference(law, target_law(toy, 3)) > 1e-3:
            broken.add(toy_name)
    assert broken == BROKEN_BY[name]


@pytest.mark.parametrize("name", ["stochastic", "zeros", "hot", "cold"])
def test_behavior_and_policy_logprobs_agree_where_the_law_is_the_target(name):
    toy = TOYS[name]
    logits_1LV = torch.tensor([[toy.target_weights(())]], dtype=torch.float64).log()
    is_chosen_11 = torch.ones((1, 1), dtype=torch.bool)
    for token in np.flatnonzero(toy.target_V(())).tolist():
        logprob = chosen_logprobs(
            [logits_1LV], is_chosen_11, torch.tensor([[token]]), torch.tensor([toy.temperature])
        )
        assert logprob.item() == pytest.approx(np.log(toy.target_V(())[token]), abs=1e-6)


@st.composite
def _toys_and_num_drafts(draw) -> tuple[Toy, int]:
    """Tables of small integers, zeros likely, each history with a target row of its own."""
    num_drafts = draw(st.integers(0, 2))
    vocab_size = draw(st.integers(1, 4))
    row = st.lists(st.integers(0, 5), min_size=vocab_size, max_size=vocab_size).map(
        lambda weights: weights if any(weights) else [1] * vocab_size
    )
    num_rows = sum(vocab_size**i for i in range(num_drafts + 1))
    target = draw(st.lists(row, min_size=num_rows, max_size=num_rows))
    draft = draw(st.lists(row, min_size=num_drafts, max_size=num_drafts))
    temperatures = st.sampled_from([0.0, 0.5, 1.0, 2.0])

    def target_weights(history):
        index = 0
        for token in history:
            index = index * vocab_size + token + 1
        return target[index]

    toy = Toy(
        vocab_size=vocab_size,
        target_weights=target_weights,
        draft_weights=lambda _, i: draft[i],
        temperature=draw(temperatures),
        draft_temperature=draw(temperatures),
    )
    return toy, num_drafts


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(case=_toys_and_num_drafts())
def test_committed_tokens_follow_the_target_law_whatever_the_tables(case):
    toy, num_drafts = case
    for corner in ("low", "high"):
        law = committed_law(PRODUCTION, toy, [num_drafts], num_drafts + 1, corner=corner)
        assert max_difference(law, target_law(toy, num_drafts + 1)) < 1e-12


def test_a_draft_that_was_drawn_is_judged_by_its_own_rule_alone(monkeypatch):
    """The other rule forms every row again."""

    def refuse(*_):
        raise AssertionError("no draft was certain")

    monkeypatch.setattr(reference, "draw_by_position", refuse)
    logits_BLV = torch.randn((2, 4, 5), generator=torch.Generator().manual_seed(0))
    draft = draw_draft(logits_BLV[:, :3], torch.ones(2), torch.full((2, 3), 0.4, dtype=torch.float64))
    target_BLV, uniforms_BL = logits_BLV.double().softmax(-1), torch.full((2, 4), 0.4, dtype=torch.float64)
    assert verify_block(draft, target_BLV, uniforms_BL).num_committed_B.tolist() == [4, 4]
    assert settle_first(draft, target_BLV, uniforms_BL[:, :2]).is_draft_BL.tolist() == [[True], [True]]
