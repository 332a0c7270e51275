"""What a planner decides, in worlds whose costs and acceptance are given; no test reads a clock."""

import itertools
import logging
import random
import re
from collections import Counter

import pytest

from blockroll.errors import InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.planning.cost_table import Bucket, CostTable
from blockroll.rollout.planning.planner import Planner, candidate_plans, cost_key, read_plan
from blockroll.types import PLAIN, Plan
from tests.models import adapted_policy, random_model, random_policy

TWO_4, TWO_8, TWO_16 = Plan(4), Plan(8), Plan(16)
FUSED_8 = Plan(8, (0, 8))
PLANS = (PLAIN, TWO_4, TWO_8, TWO_16, FUSED_8)


class World:
    """Steps that take and commit what they are told to, with noise that repeats."""

    def __init__(self, *, draft_agrees=0.8, row_cost=0.02, noise=0.0, seed=0):
        self.draft_agrees = draft_agrees  # chance that a draft is accepted, if those before it were
        self.row_cost = row_cost  # of one more row of one request, where a forward costs 1
        self.noise = noise
        self.warm = set()
        self.rng = random.Random(seed)

    def seconds(self, plan, batch_size, context=64):
        rows = plan.rows_per_forward * batch_size
        return 1e-3 * plan.forwards_per_step * (1 + self.row_cost * rows) * (1 + context / 4096)

    def tokens(self, plan):
        return sum(self.draft_agrees**i for i in range(plan.num_drafts + 1))

    def speed(self, plan, batch_size):
        return batch_size * self.tokens(plan) / self.seconds(plan, batch_size)

    def draw_tokens(self, plan):
        count = 1
        while count <= plan.num_drafts and self.rng.random() < self.draft_agrees:
            count += 1
        return count

    def run(self, planner, num_steps, batch_size, context=64):
        """The plans of so many steps; the first of each plan in a bucket takes ten times as long."""
        chosen = []
        for _ in range(num_steps):
            plan = planner.choose(batch_size, context)
            seconds = self.seconds(plan, batch_size, context)
            seconds *= self.rng.uniform(1, 1 + self.noise)
            place = (plan, Bucket.of(batch_size, context))
            if place not in self.warm:
                self.warm.add(place)
                seconds *= 10
            num_tokens = sum(self.draw_tokens(plan) for _ in range(batch_size))
            planner.observe(plan, batch_size, context, seconds, num_tokens)
            chosen.append(plan)
        return chosen


def most_common(plans):
    return Counter(plans).most_common(1)[0][0]


def mean_speed(world, plans, batch_size):
    """Expected tokens of these steps over the seconds they take."""
    tokens = sum(batch_size * world.tokens(plan) for plan in plans)
    return tokens / sum(world.seconds(plan, batch_size) for plan in plans)


def test_a_plan_that_was_tried_in_bad_moments_gets_more_chances():
    """It is three times as fast as plain, and seemed slower."""
    world, planner = World(draft_agrees=0.9, row_cost=0.0005), Planner([TWO_8])
    fair = world.seconds
    world.seconds = lambda plan, *place: fair(plan, *place) * (3.5 if plan == TWO_8 else 1)
    assert most_common(world.run(planner, 120, 1)[-40:]) == PLAIN
    world.seconds = fair
    assert most_common(world.run(planner, 1000, 1)[-200:]) == TWO_8


@pytest.mark.parametrize("phase", [37, 400])  # steps
@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_a_machine_that_slows_down_and_speeds_up_changes_no_decision(phase, batch_size):
    """Threefold, all plans alike; some single steps take five times as long beside."""
    world, planner = World(draft_agrees=0.8, row_cost=0.02, noise=0.2), Planner(PLANS)
    fair, steps = world.seconds, itertools.count()

    def seconds(*place):
        slow = 3 if next(steps) // phase % 2 else 1
        return fair(*place) * slow * (5 if world.rng.random() < 0.03 else 1)

    world.seconds = seconds
    settled = world.run(planner, 2000, batch_size)[-1000:]
    world.seconds = fair
    best = max(world.speed(plan, batch_size) for plan in PLANS)
    assert mean_speed(world, settled, batch_size) > 0.9 * best


def test_a_plan_is_compared_with_plain_at_the_batch_it_ran_at():
    """Requests end meanwhile, the more the more a step commits, and steps get shorter."""
    world, planner = World(row_cost=0.5), Planner([TWO_8])
    while planner.costs.num_samples(TWO_8, Bucket(64, 64)) < 4:
        batch_size = 64
        while batch_size > 32:
            plan = world.run(planner, 1, batch_size)[0]
            batch_size -= 1 if plan == PLAIN else 5
        world.run(planner, 1, 1)
    expected = [world.seconds(TWO_8, batch) / world.seconds(PLAIN, batch) for batch in (63, 33)]
    measured = planner.costs.cost(TWO_8, Bucket(64, 64))
    assert min(expected) * 0.99 < measured < max(expected) * 1.01


@pytest.mark.parametrize("batch_size", [1, 8, 64])
@pytest.mark.parametrize("draft_agrees", [0.2, 0.6, 0.9])
@pytest.mark.parametrize("row_cost", [0.0005, 0.02, 0.5])
def test_the_fastest_plan_is_found_and_kept(batch_size, draft_agrees, row_cost):
    world = World(draft_agrees=draft_agrees, row_cost=row_cost, noise=0.1)
    settled = world.run(Planner(PLANS), 800, batch_size)[-256:]
    best = max(world.speed(plan, batch_size) for plan in PLANS)
    assert world.speed(most_common(settled), batch_size) > 0.88 * best
    assert mean_speed(world, settled, batch_size) > 0.86 * best  # timing rivals again included


def test_each_bucket_has_its_own_best_plan():
    world, planner = World(row_cost=0.02), Planner(PLANS)
    for batch_size in (64, 1, 64, 1):
        world.run(planner, 200, batch_size)
    assert most_common(world.run(planner, 50, 1)) == FUSED_8
    assert most_common(world.run(planner, 50, 64)) == PLAIN
    assert most_common(world.run(planner, 50, 40)) == PLAIN
    assert planner.costs.num_samples(FUSED_8, Bucket(1, 64)) > planner.costs.num_samples(
        FUSED_8, Bucket(64, 64)
    )


def test_a_trial_is_a_step_between_two_plain_ones():
    world, planner = World(), Planner([TWO_4])
    first = [PLAIN, TWO_4, TWO_4, PLAIN]  # where the plan never ran, a step warms it up
    assert world.run(planner, 4, 1) == first
    assert world.run(planner, 6, 1) == [PLAIN, TWO_4, PLAIN] * 2


def test_a_new_bucket_begins_with_what_was_best_next_to_it():
    world, planner = World(row_cost=0.0005), Planner([TWO_8])
    world.run(planner, 300, 8)
    for batch_size, context in ((16, 64), (16, 128), (8, 100), (4, 64)):
        chosen = world.run(planner, 60, batch_size, context)
        assert planner.costs.num_samples(TWO_8, Bucket.of(batch_size, context)) >= 4
        assert chosen.count(TWO_8) > 40
    assert world.run(planner, 4, 64, 4096) == [PLAIN, TWO_8, TWO_8, PLAIN]  # far away from all


def test_the_first_step_of_a_plan_in_a_bucket_is_no_sample():
    """It takes ten times as long in this world."""
    world, planner = World(), Planner(PLANS)
    world.run(planner, 500, 1)
    for plan in PLANS:
        cost = planner.costs.cost(plan, Bucket(1, 64))
        assert cost == pytest.approx(world.seconds(plan, 1) / world.seconds(PLAIN, 1), 0.01)


def test_one_slow_step_decides_nothing():
    world, planner = World(row_cost=0.0005), Planner([TWO_8])
    assert most_common(world.run(planner, 200, 8)[-50:]) == TWO_8
    planner.observe(TWO_8, 8, 64, 10.0, 8 * 5)
    assert world.run(planner, 50, 8).count(TWO_8) >= 45


def test_trying_ends_and_a_wide_plan_that_cannot_win_never_runs():
    world = World(draft_agrees=0.1, row_cost=0.02)
    planner = Planner([TWO_4, TWO_8])
    chosen = world.run(planner, 1000, 16)
    assert set(chosen[:20]) == {PLAIN, TWO_4}
    assert set(chosen[20:]) == {PLAIN}


def test_a_plan_never_tried_is_expected_to_commit_all_its_drafts():
    planner = Planner([TWO_4, TWO_8])
    assert (planner.expected_tokens(TWO_4), planner.expected_tokens(TWO_8)) == (5, 9)
    for _ in range(200):
        planner.observe(TWO_4, 8, 64, 0.001, 16)
    assert planner.expected_tokens(TWO_4) == pytest.approx(2, abs=0.02)
    assert planner.expected_tokens(TWO_8) == pytest.approx(3, abs=0.04)  # 1 + 8 drafts, a quarter accepted
    assert planner.expected_tokens(PLAIN) == 1


def test_a_plan_is_replaced_only_by_one_that_is_faster_by_a_margin():
    """One that is 2 % faster changes nothing, one that is 20 % faster does, and again the other way round."""
    planner = Planner([TWO_4])
    costs = {PLAIN: 1.0, TWO_4: 2.0}

    def run(num_steps):
        chosen = []
        for _ in range(num_steps):
            plan = planner.choose(1024, 64)
            planner.observe(plan, 1024, 64, costs[plan], 2048 if plan == TWO_4 else 1024)
            chosen.append(plan)
        return chosen

    assert most_common(run(100)[-50:]) == PLAIN
    costs[PLAIN] = 1.02
    assert most_common(run(2000)[-50:]) == PLAIN
    costs[PLAIN] = 1.2
    assert most_common(run(3000)[-50:]) == TWO_4
    costs[TWO_4] = 2.48  # plain is 3 % faster than that
    assert most_common(run(3000)[-50:]) == TWO_4
    costs[TWO_4] = 2.9
    assert most_common(run(3000)[-50:]) == PLAIN


def test_a_fall_in_acceptance_brings_plain_back_and_a_rise_is_found_again():
    world, planner = World(draft_agrees=0.8, row_cost=0.01), Planner([TWO_8])
    assert most_common(world.run(planner, 200, 8)[-50:]) == TWO_8
    world.draft_agrees = 0.05
    assert most_common(world.run(planner, 1000, 8)[-100:]) == PLAIN
    world.draft_agrees = 0.8
    assert most_common(world.run(planner, 11_000, 8)[-100:]) == TWO_8


def test_trying_stops_when_its_time_is_up():
    world = World(draft_agrees=0.9, row_cost=0.0005)
    slow = [world.run(Planner([TWO_8], max_measure_s=limit), 60, 1).count(TWO_8) for limit in (0.0, 1e9)]
    assert slow[0] < 5 < slow[1]


def test_a_policy_that_cannot_draft_decodes_plain():
    policy = random_policy()
    policy.mask_token_id = None
    assert candidate_plans(policy) == (PLAIN,)
    assert set(World().run(Planner(candidate_plans(policy)), 50, 4)) == {PLAIN}


@pytest.mark.parametrize(
    ("trained_drafts", "layouts", "names"),
    [
        (0, ("two_forward", "fused"), ["plain"]),
        (8, (), ["plain"]),
        (8, ("two_forward",), ["plain", "two_forward(4)", "two_forward(8)"]),
        (6, ("two_forward",), ["plain", "two_forward(4)", "two_forward(6)"]),
        (1, ("two_forward", "fused"), ["plain", "two_forward(1)", "fused(1,[0])", "fused(1,[0,1])"]),
        (4, ("fused",), ["plain", "fused(4,[0])", "fused(4,[0,2,4])"]),
    ],
)
def test_candidates_are_what_the_policy_was_trained_for(trained_drafts, layouts, names):
    policy = random_policy()
    policy.trained_drafts, policy.trained_layouts = trained_drafts, layouts
    assert [plan.name for plan in candidate_plans(policy)] == names


def test_the_cost_of_a_plan_never_measured_follows_from_those_measured_there_or_next_to_it():
    """A step takes f + (r - f) s plain steps; a two-forward step of 4 drafts has 2 forwards and 10 rows."""
    table, bucket = CostTable(), Bucket(8, 64)
    assert [table.cost(plan, bucket) for plan in (PLAIN, TWO_4, FUSED_8)] == [1, 2, 1]  # as if rows were free
    table.add(TWO_4, bucket, 2 + 8 * 0.1)
    assert table.cost(TWO_8, bucket) == pytest.approx(2 + 16 * 0.1)
    assert table.cost(FUSED_8, bucket) == pytest.approx(1 + 26 * 0.1)
    table.add(TWO_8, bucket, 9.0)  # what was measured counts as it is
    assert table.cost(TWO_8, bucket) == 9.0
    assert table.cost(TWO_4, Bucket(4, 64)) > 2
    assert table.cost(TWO_4, Bucket(2, 64)) == 2


def test_the_draft_forwards_that_start_fused_plans_count():
    """Half of the time of every step in use: the plan takes twice what a trial shows."""
    planner, bucket = Planner([FUSED_8]), Bucket(8, 64)
    for _ in range(4):
        planner.costs.add(FUSED_8, bucket, 1.5)
    for _ in range(60):
        planner.choose(8, 64)
        planner.observe(FUSED_8, 8, 64, 0.2, 32, start_seconds=0.1)
    assert planner.expected_tokens(FUSED_8) == pytest.approx(4, abs=0.1)
    assert planner.speedup(FUSED_8, bucket) == pytest.approx(4 / 3, abs=0.05)


def test_costs_outlive_the_process(tmp_path):
    path = tmp_path / "deep" / "table.json"
    world = World(row_cost=0.0005)
    world.run(Planner(PLANS, costs=CostTable.load(path)), 300, 8)
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]
    again = CostTable.load(path)
    ratio = world.seconds(FUSED_8, 8) / world.seconds(PLAIN, 8)
    assert again.cost(FUSED_8, Bucket(8, 64)) == pytest.approx(ratio)
    assert again.num_samples(FUSED_8, Bucket(8, 64)) >= 4
    assert again.num_samples(FUSED_8, Bucket(16, 64)) == 0
    assert most_common(world.run(Planner(PLANS, costs=again), 40, 8)) != PLAIN


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"plain_steps_per_step": {"three_forward": {"1x64": [0.1]}}}',
        '{"plain_steps_per_step": {"two_forward(8)": {"1": [0.1]}}}',
        '{"plain_steps_per_step": {"two_forward(8)": {"1x64": 0.1}}}',
        '{"plain_steps_per_step": {"two_forward(8)": {"1x64": [-0.1]}}}',
        '{"plain_steps_per_step": {"two_forward(8)": {"1x64": [NaN]}}}',
        '{"plain_steps_per_step": {"two_forward(8)": {"1x64": ["0.1"]}}}',
    ],
)
def test_a_damaged_cost_table_is_ignored_with_a_warning_that_names_it(tmp_path, caplog, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    table = CostTable.load(path)
    assert str(path) in caplog.text
    assert table.num_samples(TWO_8, Bucket(1, 64)) == 0
    table.add(TWO_8, Bucket(1, 64), 2.5)
    table.save()
    assert CostTable.load(path).cost(TWO_8, Bucket(1, 64)) == 2.5


def test_a_table_that_cannot_be_written_is_kept_in_memory(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    table = CostTable(tmp_path / "file" / "table.json")
    table.add(TWO_8, Bucket(1, 64), 2.5)
    table.save()
    table.save()
    assert caplog.text.count("cannot be written") == 1
    assert table.cost(TWO_8, Bucket(1, 64)) == 2.5


def test_buckets_are_powers_of_two():
    assert Bucket.of(1, 1) == Bucket(1, 64)
    assert Bucket.of(5, 100) == Bucket(8, 128)
    assert Bucket.of(8, 128) == Bucket(8, 128)
    assert Bucket.of(9, 129) == Bucket(16, 256)


def test_every_switch_is_logged_with_the_expectation_of_both(caplog):
    caplog.set_level(logging.INFO)
    world, planner = World(row_cost=0.0005), Planner([TWO_8])
    world.run(planner, 100, 8)
    (message,) = caplog.messages
    assert re.fullmatch(
        r"plan two_forward\(8\) after plain at batch up to 8, context up to 64: "
        r"expected [\d.]+x plain, against 1x",
        message,
    )


def test_the_config_names_a_plan_or_leaves_it_to_a_planner(tmp_path):
    policy = random_policy()
    assert read_plan("fixed:two_forward", policy) == TWO_4
    planner = read_plan("auto", policy)
    assert isinstance(planner, Planner)
    assert planner.name == "auto"
    assert set(planner.candidates) == set(candidate_plans(policy))
    assert planner.costs.path == tmp_path / "plans" / f"{cost_key(policy)}.json"
    with pytest.raises(InvalidInput, match="plan must be"):
        read_plan("automatic", policy)


def test_the_key_of_a_cost_table_follows_the_architecture_and_not_the_weights():
    keys = [cost_key(random_policy(seed=0)), cost_key(random_policy(seed=1))]
    assert keys[0] == keys[1]
    half = HFPolicy(random_model().bfloat16())
    assert len({keys[0], cost_key(half), cost_key(random_policy("qwen3")), cost_key(adapted_policy())}) == 4
