"""What a sweep concludes: pairs by prompt, bands that hold together, the fastest point that loses little."""

import dataclasses
import json
import math
import random

import pytest

from blockroll.bench import frontier
from blockroll.bench.frontier import (
    Band,
    RewardsByPrompt,
    conclusion,
    from_record,
    mark,
    prompts_needed,
    to_record,
)
from blockroll.errors import InvalidInput
from tests.sweep_rows import PLAIN, band, point, sweep_rows


def rewards(chances, *, samples=4, seed=0):
    """Coins of each prompt's chance, in an order that has nothing to do with prompts."""
    draw = random.Random(seed)
    found = RewardsByPrompt(low=0.0, high=1.0)
    pairs = [(prompt, chance) for prompt, chance in enumerate(chances) for _ in range(samples)]
    for prompt, chance in draw.sample(pairs, len(pairs)):
        found.add(prompt, float(draw.random() < chance))
    return found


def chances(count, *, lost=0.0, seed=0):
    draw = random.Random(f"chances {seed}")
    return [draw.uniform(0.1, 0.9) - lost for _ in range(count)]


def test_a_point_that_loses_is_not_marked_and_a_faster_one_that_loses_nothing_is():
    count = 3000
    order = range(count)
    plain = rewards(chances(count), seed=1)
    bands = [
        rewards(chances(count, lost=lost), seed=2).difference(plain, order, alpha=0.02) for lost in (0.0, 0.1)
    ]
    rows = mark([PLAIN, point(1.0, 1.5, band(0.0, -0.02, 0.02)), *map(point, (0.5, 0.25), (2.0, 3.0), bands)])

    assert bands[1].mean == pytest.approx(-0.1, abs=0.02)
    assert [row.finding for row in rows] == ["lossless", "lossless", "within", "loses"]
    assert [row.is_marked for row in rows] == [False, False, True, False]


def test_equal_rewards_of_prompts_that_differ_leave_no_spread_between_pairs():
    """So harmless laws are told apart at all: prompts differ much more than laws do."""
    sure = [float(prompt % 3 == 0) for prompt in range(600)]
    order = random.Random(0).sample(range(600), 600)
    plain, point_rewards = rewards(sure, seed=1), rewards(sure, seed=2)

    paired = point_rewards.difference(plain, order, alpha=0.05)
    assert paired.mean == 0
    assert paired.high - paired.low < 0.06
    own = plain.band(order, alpha=0.05)
    assert own.low < 1 / 3 < own.high
    assert own.high - own.low > 0.1


def falsely_marked(trials=150, count=60):
    """How often a point that loses a bit more than it may is said to be within the loss."""
    marked = 0
    for trial in range(trials):
        plain = rewards([0.5] * count, seed=f"plain {trial}")
        found = rewards([0.44] * count, seed=f"mixed {trial}").difference(plain, range(count), alpha=0.05)
        marked += mark([PLAIN, point(0.5, 2.0, found)])[1].is_marked
    return marked


def test_a_point_that_loses_too_much_is_marked_in_at_most_alpha_of_sweeps(monkeypatch):
    limit = 0.05 * 150 + 3.3 * math.sqrt(150 * 0.05 * 0.95)
    assert falsely_marked() <= limit

    def one_standard_error(values, alpha):
        listed = list(values)
        mean = sum(listed) / len(listed)
        error = math.sqrt(sum((value - mean) ** 2 for value in listed)) / len(listed)
        return Band(mean=mean, low=mean - 0.5 * error, high=mean + 0.5 * error)

    monkeypatch.setattr(frontier, "_bounded", one_standard_error)
    assert falsely_marked() > limit


def test_rewards_are_scaled_by_their_bounds_and_failed_ones_count_as_the_lower():
    found, plain = (RewardsByPrompt(low=-2.0, high=2.0) for _ in range(2))
    for prompt in range(50):
        found.add(prompt, 1.0 if prompt else math.nan)
        plain.add(prompt, 0.0)

    assert found.num_failed == 1
    assert found.band(range(50), alpha=0.05).mean == pytest.approx((49 - 2) / 50)
    assert found.difference(plain, range(50), alpha=0.05).mean == pytest.approx((49 - 2) / 50)
    with pytest.raises(InvalidInput, match="lies outside -2 to 2"):
        found.add(0, 2.5)


def test_of_what_is_no_loss_the_fastest_is_marked_at_each_temperature():
    harmless = band(0.0, -0.04, 0.04)
    warm = [PLAIN, point(0.5, 2.0, harmless), point(0.25, 2.5, harmless)]
    cold = [dataclasses.replace(row, temperature=0.5) for row in (PLAIN, point(0.5, 0.8, harmless))]
    assert [row.is_marked for row in mark([*warm, *cold])] == [False, False, True, True, False]


def test_drafts_that_should_lose_nothing_and_do_are_not_marked():
    rows = mark([PLAIN, point(1.0, 2.0, band(-0.03, -0.04, -0.02))])
    assert [row.finding for row in rows] == ["lossless", "refuted"]
    assert rows[0].is_marked
    assert "should be lossless and is not, -0.030 (-0.040 to -0.020): run `blockroll doctor`" in " ".join(
        conclusion(rows)
    )


def test_the_conclusion_says_what_is_marked_and_why_faster_points_are_not():
    (line,) = conclusion(sweep_rows())
    assert line == (
        "Temperature 1: the fastest that loses at most 0.05 of the reward's range is two_forward(8) at mix "
        "weight 0.75, 1.80x plain (1.70 to 1.90), reward 0.490, -0.010 (-0.030 to +0.010) against plain's. "
        "Not marked: two_forward(8) at mix weight 0.25 (3.00x), which loses more, -0.200 (-0.250 to -0.150); "
        "two_forward(8) at mix weight 0.5 (2.00x), of which 400 prompts cannot tell, -0.010 (-0.090 to "
        "+0.070); about 1,600 prompts could."
    )
    (line,) = conclusion(mark([PLAIN]))
    assert line.endswith("is plain, 1.00x plain (1.00 to 1.00).")


def test_about_how_many_prompts_would_do():
    assert prompts_needed(point(0.5, 2.0, band(-0.01, -0.09, 0.07))) == 1600
    assert prompts_needed(point(0.5, 2.0, band(-0.06, -0.09, 0.07))) is None


def test_rows_come_back_from_json_as_they_were():
    rows = mark([PLAIN, point(0.5, 2.0, band(-0.01, -0.02, 0.01))])
    assert [from_record(json.loads(json.dumps(to_record(row)))) for row in rows] == rows
    record = to_record(rows[0])
    del record["difference"]
    with pytest.raises(InvalidInput, match="has no 'difference'"):
        from_record(record)
