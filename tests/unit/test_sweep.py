"""A sweep on a tiny policy: which points there are, what they decode, and how they are paired."""

import dataclasses
import math

import pytest

from blockroll.bench import sweep as sweep_module
from blockroll.bench.sweep import SweepOptions, places_of, points, run_sweep
from blockroll.errors import InvalidInput
from blockroll.rollout.calibration.confidence import ConfidenceSequence
from blockroll.rollout.planning.reading import read_plan
from blockroll.types import HISTORY, PLAIN, Plan
from tests.models import prompts, random_policy

TWO_FORWARD = Plan(4)
OPTIONS = SweepOptions(mix_weights=(1.0, 0.5), batch=4, max_tokens=10, samples=3, max_loss=0.5)
PROMPTS = prompts(9)


def planted(places, rollouts):
    """A reward of the prompt alone, by the prompt that was really answered: no law gains or loses."""
    return [float(PROMPTS.index(rollout.request.prompt_ids) % 2) for rollout in rollouts]


def swept(policy, plans=(TWO_FORWARD,), options=OPTIONS, reward=planted, **more):
    return run_sweep(policy, PROMPTS, plans, options, reward=reward, task="own", policy_path="tiny", **more)


@pytest.fixture(scope="module")
def policy():
    return random_policy()


def test_every_point_answers_the_same_prompts_and_pairs_by_prompt(policy):
    seen, told = [], []

    def reward(places, rollouts):
        seen.extend((place, rollout) for place, rollout in zip(places, rollouts, strict=True))
        return planted(places, rollouts)

    rows = swept(policy, reward=reward, on_progress=lambda done, total: told.append((done, total)))

    assert [(row.plan, row.mix_weight) for row in rows] == [
        ("plain", 1.0),
        ("two_forward(4)", 1.0),
        ("two_forward(4)", 0.5),
    ]
    assert all(PROMPTS[place] == rollout.request.prompt_ids for place, rollout in seen)
    requests = {}
    for _, rollout in seen:
        requests.setdefault(rollout.request.request_id, set()).add(rollout.request.seed)
    assert len(requests) == 9 * 3 + 4  # and a wave to warm up
    assert all(len(seeds) == 1 for seeds in requests.values())
    assert told == [(i, 3 * (3 * 3 + 1)) for i in range(1, 31)]
    for row in rows:
        assert (row.num_prompts, row.samples, len(row.speedup_all)) == (9, 3, 3)
        assert row.reward == pytest.approx(4 / 9)
        assert row.speedup_min <= row.speedup_over_plain <= row.speedup_max
        assert row.difference in (None, 0.0)
    assert rows[0].speedup_all == (1.0, 1.0, 1.0)
    assert rows[0].acceptance_rate is None
    assert 0 < rows[1].acceptance_rate < rows[2].acceptance_rate
    assert rows[2].tokens_per_forward > rows[0].tokens_per_forward == 1


def test_pairing_by_position_is_noticed(policy, monkeypatch):
    """Rollouts end in another order under each point: who takes them in turn compares prompts, not laws."""
    many = prompts(60)
    options = dataclasses.replace(OPTIONS, batch=10)

    def width():
        row = run_sweep(
            policy,
            many,
            [TWO_FORWARD],
            options,
            reward=lambda places, rollouts: [
                float(many.index(rollout.request.prompt_ids) % 2) for rollout in rollouts
            ],
            task="own",
            policy_path="tiny",
        )[-1]
        return row.difference_cs_high - row.difference_cs_low

    none = ConfidenceSequence(0.05 / 2)  # of differences that are all 0, where two points are compared
    for _ in many:
        none.add(0.5)
    assert width() == pytest.approx(2 * (none.high - none.low), abs=1e-9)
    monkeypatch.setattr(sweep_module, "places_of", lambda rollouts: sorted(places_of(rollouts)))
    assert width() > 2 * (none.high - none.low) + 0.02


def test_points_are_what_makes_a_difference_to_a_plan(policy):
    options = dataclasses.replace(OPTIONS, draft_temperatures=(0.5, 1.0))
    history, auto = Plan(4, drafter=HISTORY), read_plan("auto", policy)
    found = [
        (each.plan.name, each.sampling.law.weight, each.sampling.draft_temperature)
        for each in points([PLAIN, Plan(4), history, auto], 1.0, options)
    ]
    grid = [(drafts, weight) for drafts in (0.5, 1.0) for weight in (1.0, 0.5)]
    assert found == [
        ("plain", 1.0, None),
        *(("two_forward(4)", weight, drafts) for drafts, weight in grid),
        ("history(4)", 1.0, None),
        *((auto.name, weight, drafts) for drafts, weight in grid),
    ]


def test_temperatures_are_compared_each_with_its_own_plain_decoding(policy):
    rows = swept(policy, options=dataclasses.replace(OPTIONS, temperatures=(1.0, 0.5), mix_weights=(0.5,)))
    assert [(row.plan, row.temperature, row.difference) for row in rows] == [
        ("plain", 1.0, None),
        ("two_forward(4)", 1.0, 0.0),
        ("plain", 0.5, None),
        ("two_forward(4)", 0.5, 0.0),
    ]
    assert [sum(row.is_marked for row in rows[i : i + 2]) for i in (0, 2)] == [1, 1]


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"mix_weights": (1.0, 1.5)}, "between 0 and 1, got 1.5"),
        ({"temperatures": (0.0,)}, "no greedy form"),
        ({"draft_temperatures": (-1.0,)}, "draft_temperature must be at least 0"),
        ({"draft_temperatures": (0.5, 0.5)}, "measured once"),
        ({"samples": 2}, "at least 3 samples"),
        ({"batch": 0}, "at least 1"),
        ({"max_loss": -0.1}, "share of the reward's range"),
        ({"max_loss": math.nan}, "share of the reward's range"),
        ({"reward_high": 0.0}, "must be below reward_high"),
    ],
)
def test_options_out_of_range_are_refused_with_advice(changes, advice):
    with pytest.raises(InvalidInput, match=advice):
        dataclasses.replace(OPTIONS, **changes)


@pytest.mark.parametrize(
    ("plans", "given", "advice"),
    [
        ([Plan(4)], PROMPTS[:1], "at least 2, got 1"),
        ([PLAIN], PROMPTS, "plans that draft"),
        ([Plan(4), Plan(4)], PROMPTS, "measured once"),
        ([Plan(4)], [tuple([5] * 95)] * 2, "the policy was built for"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_advice(policy, plans, given, advice):
    with pytest.raises(InvalidInput, match=advice):
        run_sweep(policy, given, plans, OPTIONS, reward=planted, task="own", policy_path="tiny")


def test_rewards_that_all_fail_are_refused_before_the_long_part(policy):
    told = []
    with pytest.raises(InvalidInput, match="none of the 4 rollouts of the warm-up has a reward"):
        swept(
            policy,
            reward=lambda places, rollouts: [math.nan] * len(rollouts),
            on_progress=lambda done, total: told.append(done),
        )
    assert told == []
