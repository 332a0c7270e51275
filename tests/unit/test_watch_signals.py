"""What metrics say of rollouts and of counted steps, against figures worked out by hand."""

import math

import pytest

from blockroll.rl_loops.watch.signals import (
    MOST_SOURCES,
    count_metrics,
    known,
    reward_metrics,
    rollout_rates,
    source_of,
    staleness_metrics,
    step_metrics,
    values_of,
)
from blockroll.types import HISTORY, Law, Plan, Request, RequestStep, Rollout, RolloutStats, counted

PLAIN, TWO, FUSED = Plan(0), Plan(3), Plan(3, (0, 3))
RECALL = Plan(2, drafter=HISTORY)
YES, NO = True, False
STEPS = {
    RequestStep(PLAIN, None, 0, (NO,), 1): 5,
    # The first position is settled by itself: rejected, and the two behind it accepted.
    RequestStep(TWO, None, 3, (NO, YES, YES, NO), 4): 2,
    RequestStep(TWO, None, 3, (YES, NO), 2): 1,
    # All accepted, and cut off behind the first.
    RequestStep(FUSED, 3, 3, (YES, YES, YES, NO), 1): 1,
    RequestStep(FUSED, 0, 2, (YES, NO), 2): 2,
    RequestStep(FUSED, None, 3, (NO,), 1): 1,
    RequestStep(RECALL, None, 2, (YES, YES, NO), 3): 1,
    RequestStep(RECALL, None, 0, (NO,), 1): 4,  # history had nothing for it
}


def rollout(token_ids=(5, 6), *, policy=-1.0, behavior=-1.0, versions=None, reason="stop", steps=()):
    request = Request(request_id="r", prompt_ids=(1,), seed=0)
    size = len(token_ids)
    return Rollout(
        request=request,
        token_ids=tuple(token_ids),
        policy_logprobs=tuple(policy) if isinstance(policy, list) else (policy,) * size,
        behavior_logprobs=(behavior,) * size,
        policy_versions=versions or (0,) * size,
        law=Law(),
        finish_reason=reason,
        stats=RolloutStats(steps=tuple(steps)),
    )


def test_acceptance_from_all_sides_is_that_of_the_counts():
    metrics = count_metrics(STEPS)
    # Committed and accepted drafts over submitted ones: of masks 4+1+1+2+0 of 6+3+3+4+3, of history 2 of 2.
    assert metrics["rollout/acceptance_rate"] == pytest.approx(10 / 21)
    assert metrics["rollout/acceptance_rate/mask_rows"] == pytest.approx(8 / 19)
    assert metrics["rollout/acceptance_rate/history"] == 1
    assert metrics["rollout/acceptance_rate_level_3"] == pytest.approx(1 / 3)
    assert metrics["rollout/acceptance_rate_level_0"] == pytest.approx(2 / 4)
    # As drawn: the first of 2 no, 1 yes, 1 yes, 2 yes, 1 no, 1 yes.
    assert metrics["rollout/spec_accept_rate_pos_1"] == pytest.approx(5 / 8)
    assert metrics["rollout/spec_accept_rate_pos_2"] == pytest.approx(4 / 7)
    assert metrics["rollout/spec_accept_rate_pos_3"] == pytest.approx(3 / 3)
    lengths = [metrics[f"rollout/spec_accept_length_share_{n}"] for n in range(4)]
    assert lengths == pytest.approx([1 / 8, 3 / 8, 3 / 8, 1 / 8])
    # Committed: 5 plain, 8 and 2 of two-forward, 1, 4 and 1 of fused, 3 and 4 of history.
    assert metrics["rollout/recovered_share"] == pytest.approx((2 + 1 + 2 + 1) / 28)
    assert metrics["rollout/extra_share"] == pytest.approx((2 + 1 + 4) / 28)
    plans = {name: value for name, value in metrics.items() if name.startswith("rollout/plan/")}
    assert plans == {
        "rollout/plan/plain": 5 / 17,
        "rollout/plan/two_forward(3)": 3 / 17,
        "rollout/plan/fused(3,[0,3])": 4 / 17,
        "rollout/plan/history(2)": 5 / 17,
    }
    assert not any(math.isnan(value) for value in metrics.values())


def test_tokens_are_accepted_recovered_extra_or_plain():
    kinds = [
        (step.num_accepted + step.num_recovered + step.num_extra, step.num_kept)
        for step in STEPS
        if step.plan != PLAIN
    ]
    assert all(ours == kept for ours, kept in kinds)


def test_a_histogram_has_the_lengths_between():
    metrics = count_metrics({RequestStep(FUSED, 0, 3, (YES, YES, NO), 3): 1})
    assert [metrics[f"rollout/spec_accept_length_share_{n}"] for n in range(3)] == [0, 0, 1]
    assert "rollout/spec_accept_length_share_3" not in metrics


@pytest.mark.parametrize("counts", [{}, {RequestStep(PLAIN, None, 0, (NO,), 1): 3}], ids=["none", "plain"])
def test_without_drafts_acceptance_has_no_value_and_no_families(counts):
    metrics = count_metrics(counts)
    assert math.isnan(metrics["rollout/acceptance_rate"])
    assert not [name for name in metrics if "level" in name or "pos" in name or "length_share" in name]
    assert [name for name in known(metrics) if "share" in name] == (
        ["rollout/recovered_share", "rollout/extra_share"] if counts else []
    )


def test_counts_of_processes_add_up():
    first, second = ({step: n for step, n in STEPS.items() if n % 2 == odd} for odd in (0, 1))
    together = counted([tuple(first.items()), tuple(second.items()), tuple(first.items())])
    want = {step: n * (2 if n % 2 == 0 else 1) for step, n in STEPS.items()}
    assert count_metrics(together) == pytest.approx(count_metrics(want))


def test_perplexities_are_of_all_finite_tokens_together():
    texts = [rollout((1, 2, 3), policy=[-1.0, -2.0, -math.inf], behavior=-0.5), rollout((1,), policy=-6.0)]
    metrics = values_of(rollout_rates(texts, 1.0))
    assert metrics["rollout/perplexity_policy"] == pytest.approx(math.exp(3))
    assert metrics["rollout/perplexity_behavior"] == pytest.approx(math.exp((1.5 + 1) / 4))
    assert values_of(rollout_rates([rollout(policy=-900.0)], 1.0))["rollout/perplexity_policy"] == math.inf
    assert math.isnan(values_of(rollout_rates([rollout(())], 1.0))["rollout/perplexity_policy"])


def test_rewards_are_told_by_source_and_those_that_failed_are_left_out():
    metrics = reward_metrics([1.0, math.nan, 0.0, -2.0, 3.0], ["a", "a", "b", None, "a"])
    assert metrics == {"reward/min": -2, "reward/max": 3, "reward/by_source/a": 2, "reward/by_source/b": 0}
    assert not known(reward_metrics([math.nan], ["a"]))
    names = [str(number) for number in range(MOST_SOURCES + 1)]
    assert len(reward_metrics([1.0] * len(names), names)) == 2
    assert len(reward_metrics([1.0] * MOST_SOURCES, names[1:])) == 2 + MOST_SOURCES


@pytest.mark.parametrize(
    ("row", "source"),
    [
        ({"source": "a", "data_source": "b"}, "a"),
        ({"source": None, "data_source": "b"}, "b"),
        ({"source": "", "data_source": "b"}, "b"),
        ({"source": 3}, None),
        ({}, None),
    ],
)
def test_the_source_of_a_row_is_text_of_its_columns(row, source):
    assert source_of(row) == source


def test_staleness_is_by_the_newest_and_by_the_oldest_token():
    texts = [rollout((5, 6, 7), versions=(3, 3, 5)), rollout((5,), versions=(2,)), rollout(())]
    prefix = "training/off_policy/trajectory_"
    assert staleness_metrics(texts, 5) == {
        f"{prefix}spans/mean": 2,
        f"{prefix}spans/max": 3,
        f"{prefix}spans/min": 1,
        f"{prefix}staleness/mean": 1.5,
        f"{prefix}staleness/max": 3,
        f"{prefix}staleness/min": 0,
        f"{prefix}staleness_worst/mean": 2.5,
        f"{prefix}staleness_worst/max": 3,
        f"{prefix}staleness_worst/min": 2,
    }
    assert not known(staleness_metrics([rollout(())], 5))


def test_lengths_are_of_all_completions_and_of_those_that_ended():
    texts = [
        rollout(range(2), reason="stop"),
        rollout(range(5), reason="stop"),
        rollout(range(9), reason="length"),
        rollout((1,), reason="abort"),
    ]
    metrics = step_metrics(texts, [{}] * 4, [0.0] * 4, version=0, duration_s=2.0)
    lengths = {name.split("/")[1]: value for name, value in metrics.items() if "completions/" in name}
    assert lengths == {
        "mean_length": 17 / 4,
        "min_length": 1,
        "max_length": 9,
        "mean_terminated_length": 3.5,
        "min_terminated_length": 2,
        "max_terminated_length": 5,
        "clipped_ratio": 1 / 4,
    }
    assert (metrics["rollout/failed"], metrics["rollout/generated_tok_s"]) == (1, 8.5)
    none_ended = step_metrics(texts[2:], [{}] * 2, [0.0] * 2, version=0, duration_s=2.0)
    assert math.isnan(none_ended["completions/min_terminated_length"])


def test_texts_that_go_round_are_counted():
    texts = [rollout([7] * 20), rollout(range(20)), rollout([*range(14), 3, 3, 3, 3, 3, 3])]
    metrics = values_of(rollout_rates(texts, 1.0))
    assert metrics["rollout/repetition_mean"] == pytest.approx(1 / 3)
    assert metrics["rollout/repetition_share"] == pytest.approx(1 / 3)
