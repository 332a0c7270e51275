"""Which drafts a step verifies, held against all other ways at measured costs; no test reads a clock."""

import itertools
import random
from bisect import bisect_left

import pytest

from blockroll.rollout.engine.plans import NextStep, StepsTaken
from blockroll.rollout.planning.lengths import verifiable
from blockroll.rollout.planning.planner import Planner
from blockroll.types import PLAIN, Plan
from tests.worlds import World

LOOKED_UP = tuple(Plan(size, drafter="history") for size in (1, 2, 4, 8, 16))
LEAST_SAVED = 12  # rows, as a policy of 30 layers says,
PRICE = 10  # and what packing takes

# Rows of a padded forward and plain steps that it takes, of a model of 135M on one thread: lines with knees.
MEASURED = {
    1: ((1, 1.0), (2, 1.43), (5, 1.49), (9, 1.53), (17, 1.82), (34, 2.8)),
    8: ((8, 1.0), (16, 1.18), (24, 1.45), (40, 2.1), (72, 3.4), (136, 6.9)),
    32: ((32, 1.0), (64, 1.65), (96, 2.15), (160, 3.95), (288, 7.2), (544, 14.0)),
}


def true_cost(lengths, price=PRICE):
    """Plain steps that verifying so many drafts of each request takes."""
    size = len(lengths)
    rows, rectangle = size + sum(lengths), size * (max(lengths) + 1)
    rows = rectangle if rectangle - rows < LEAST_SAVED else rows + price
    points = MEASURED[1 if size == 1 else 8 if size < 16 else 32]
    rows = rows * points[0][0] / size
    index = max(1, min(bisect_left(points, (rows, 0.0)), len(points) - 1))
    (left, low), (right, high) = points[index - 1 : index + 1]
    return low + (rows - left) / (right - left) * (high - low)


def speed(lengths, chances, price=PRICE):
    """Expected tokens of a request per plain step."""
    expected = sum(sum(each[:length]) for each, length in zip(chances, lengths, strict=True))
    return (1 + expected / len(lengths)) / true_cost(lengths, price)


def drawn_chances(rng, size, most=16):
    """Of texts of which some are sure how they go on, some guess, and some find nothing."""
    chances = []
    for _ in range(size):
        rate = rng.choice((0.98, 0.9, 0.7, 0.45, 0.2, 0.0))
        count = rng.randint(1, most) if rate else 0
        chances.append([rate**depth for depth in range(1, count + 1)])
    return chances


def best_speed(chances):
    """Of all that the likeliest drafts and padded widths allow: a request's more likely rows come first."""
    every = sorted({chance for each in chances for chance in each})
    ways = [[sum(chance >= least for chance in each) for each in chances] for least in every]
    ways += [[min(len(each), width) for each in chances] for width in range(1, 17)]
    return max([1.0, *(speed(lengths, chances) for lengths in ways if any(lengths))])


@pytest.mark.parametrize(("size", "most"), [(1, 16), (2, 16), (4, 4), (8, 2)])
def test_of_all_ways_to_draft_one_of_the_best_is_among_those_that_are_weighed(size, most):
    rng = random.Random(size)
    for _ in range(20):
        chances = drawn_chances(rng, size, most)
        if not any(chances):
            continue
        ways = itertools.product(*(range(len(each) + 1) for each in chances))
        best = max(speed(lengths, chances, LEAST_SAVED) for lengths in ways if any(lengths))
        weighed = [each.lengths(chances) for each in verifiable(chances, LEAST_SAVED)]
        assert max(speed(lengths, chances, LEAST_SAVED) for lengths in weighed) > 0.95 * best


def test_drafts_take_the_rows_of_the_rectangle_or_their_own_with_the_price_of_packing():
    chances = [[0.9] * 8, [0.5], [], []]
    by_width = {each.widest: each for each in verifiable(chances, LEAST_SAVED)}
    assert (by_width[1].rows, by_width[1].lengths(chances)) == (8, [1, 1, 0, 0])
    assert (by_width[8].rows, by_width[8].lengths(chances)) == (4 + 9 + 12, [8, 1, 0, 0])
    assert by_width[8].expected == pytest.approx(8 * 0.9 + 0.5)
    padded = [*verifiable(chances, float("inf"))]
    assert [each.rows for each in padded] == [4 * (each.widest + 1) for each in padded]
    assert padded[-1].lengths(chances) == [8, 1, 0, 0]


def follow(planner, rng, size, num_steps, draw):
    """Choose and take steps at the measured costs: for each its chances if the planner looked, its lengths,
    its time in plain steps and its tokens of a request."""
    for _ in range(num_steps):
        chances, looked = draw(rng, size), []

        def outlook(_name, _most, least_chance, chances=chances, looked=looked):
            looked += chances
            return [[chance for chance in each if chance >= least_chance] for each in chances]

        choice = planner.choose(
            NextStep(batch_size=size, context=64, least_saved=LEAST_SAVED, outlook=outlook)
        )
        lengths = choice.lengths or [0] * size
        took = 1.0 if choice.plan == PLAIN else true_cost(lengths)
        committed = sum(
            1 + sum(coin < chance for chance in each[:length])
            for coin, each, length in zip((rng.random() for _ in chances), chances, lengths, strict=True)
        )
        seconds = 1e-2 * took * rng.uniform(1, 1.2)
        planner.observe(
            StepsTaken(plan=choice.plan, batch_size=size, step_seconds=(seconds,), num_tokens=committed)
        )
        yield looked, lengths, took, committed / size


@pytest.mark.parametrize("size", [1, 8, 32])
def test_a_planner_drafts_nearly_the_best_lengths_and_achieves_what_it_predicts(size):
    """At measured costs, packing included, plain steps seldom, on a machine that is never quite as fast."""
    planner = Planner(LOOKED_UP)
    steps = [*follow(planner, random.Random(0), size, 600, drawn_chances)][100:]
    looked = [(chances, lengths) for chances, lengths, _, _ in steps if chances]
    reached = sum(speed(lengths, chances) if any(lengths) else 1.0 for chances, lengths in looked)
    assert len(looked) > 200
    assert reached > 0.95 * sum(best_speed(chances) for chances, _ in looked)
    predicted, achieved = planner.speedups
    assert predicted == pytest.approx(achieved, rel=0.2)
    assert achieved == pytest.approx(sum(step[3] for step in steps) / sum(step[2] for step in steps), rel=0.2)


@pytest.mark.parametrize("size", [1, 8, 32])
def test_where_drafts_always_pay_some_plain_steps_keep_predictions_true(size):
    """Steps that draft would else be measured against each other alone."""

    def sure(rng, size):
        return [[0.9**depth for depth in range(1, rng.choice((4, 6, 11, 17)))] for _ in range(size)]

    planner = Planner(LOOKED_UP)
    plain = [not any(lengths) for _, lengths, _, _ in follow(planner, random.Random(0), size, 300, sure)]
    assert sum(plain) < 16
    predicted, achieved = planner.speedups
    assert predicted == pytest.approx(achieved, rel=0.15)


@pytest.mark.parametrize(("look", "is_worth"), [(0.0, True), (0.15, False)])
def test_drafts_from_history_are_worth_their_look_too(look, is_worth):
    """They save a tenth of a step; `look` is what finding them takes of one."""
    world, batch_size = World(row_cost=0.01, chances=(0.2,)), 8
    world.look_s = look * world.seconds(PLAIN, batch_size) / batch_size
    chosen = world.run(Planner(LOOKED_UP), 1000, batch_size)[200:]
    assert (chosen.count(PLAIN) < len(chosen) / 2) == is_worth
    assert is_worth or chosen.count(PLAIN) > 0.95 * len(chosen)
