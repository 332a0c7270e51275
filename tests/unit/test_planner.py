"""What a planner decides, in worlds whose costs and acceptance are given; no test reads a clock."""

import itertools
import logging
import re
from collections import Counter
from dataclasses import replace

import pytest

from blockroll.errors import InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.engine.plans import NextStep
from blockroll.rollout.planning.candidates import candidate_plans, cost_key, recorded_tokens
from blockroll.rollout.planning.planner import Planner
from blockroll.rollout.planning.reading import read_plan
from blockroll.types import PLAIN
from tests.models import adapted_policy, random_model, random_policy
from tests.worlds import FUSED_8, LOOKED_UP, PLANS, TWO_4, TWO_8, World


def most_common(plans):
    return Counter(plans).most_common(1)[0][0]


def mean_speed(world, plans, batch_size):
    """Expected tokens of these steps over the seconds they take."""
    tokens = sum(batch_size * world.tokens(plan) for plan in plans)
    return tokens / sum(world.seconds(plan, batch_size) for plan in plans)


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


@pytest.mark.parametrize("batch_size", [1, 8, 64])
@pytest.mark.parametrize("draft_agrees", [0.2, 0.6, 0.9])
@pytest.mark.parametrize("row_cost", [0.0005, 0.02, 0.5])
def test_the_fastest_plan_is_found_and_kept(batch_size, draft_agrees, row_cost):
    world = World(draft_agrees=draft_agrees, row_cost=row_cost, noise=0.1)
    settled = world.run(Planner(PLANS), 2000, batch_size)[-256:]
    best = max(world.speed(plan, batch_size) for plan in PLANS)
    assert world.speed(most_common(settled), batch_size) > 0.88 * best
    assert mean_speed(world, settled, batch_size) > 0.86 * best  # timing rivals again included


def test_what_was_found_before_is_used_from_the_first_steps():
    world = World(draft_agrees=0.9, row_cost=0.005)
    early = world.run(Planner(PLANS, known_tokens={TWO_8: world.tokens(TWO_8)}), 40, 8)
    assert early.count(TWO_8) > 30
    assert TWO_8 not in world.run(Planner(PLANS), 40, 8)


def test_what_was_found_before_and_holds_no_more_costs_little():
    world = World(draft_agrees=0.1, row_cost=0.05)
    steps = world.run(Planner(PLANS, known_tokens={TWO_8: 6.5}), 2000, 8)
    assert 0 < steps.count(TWO_8) < 20
    assert mean_speed(world, steps, 8) > 0.98 * world.speed(PLAIN, 8)


def test_a_draft_adapter_records_what_its_two_forward_steps_committed():
    policy = adapted_policy()
    config = replace(policy.adapter.config, block_sizes=(4, 8), layouts=("two_forward",), extra={})
    policy.adapter.config = config
    assert recorded_tokens(policy) == {}
    record = {"two_forward(8)": 6.5, "two_forward(4)": 5.5, "fused(8)": 6.0}
    policy.adapter.config = replace(config, extra={"tokens_per_step": record})
    assert recorded_tokens(policy) == {TWO_8: 6.5}  # no step of 4 drafts commits more than 5
    policy.use_adapter(policy.adapter)
    assert read_plan("auto", policy).expected_tokens(TWO_8) == 6.5
    assert recorded_tokens(HFPolicy(random_model())) == {}


def test_each_batch_has_its_own_best_plan():
    world, planner = World(row_cost=0.02), Planner(PLANS)
    for batch_size in (64, 1, 64, 1):
        world.run(planner, 400, batch_size)
    assert most_common(world.run(planner, 50, 1)) == FUSED_8
    assert most_common(world.run(planner, 50, 64)) == PLAIN
    assert most_common(world.run(planner, 50, 40)) == PLAIN


def test_a_batch_never_met_begins_with_what_the_line_says_is_best():
    world, planner = World(row_cost=0.02), Planner(PLANS)
    for batch_size in (1, 8, 64):
        world.run(planner, 200, batch_size)
    for batch_size in (2, 24):
        chosen = world.run(planner, 40, batch_size)
        best = max(world.speed(plan, batch_size) for plan in PLANS)
        assert mean_speed(world, chosen, batch_size) > 0.85 * best


def test_one_slow_step_decides_nothing():
    world, planner = World(row_cost=0.0005), Planner([TWO_8])
    assert most_common(world.run(planner, 1000, 8)[-50:]) == TWO_8
    fair = world.seconds
    world.seconds = lambda *place: 10.0
    world.run(planner, 1, 8)
    world.seconds = fair
    assert world.run(planner, 50, 8).count(TWO_8) >= 45


def test_trying_ends_and_a_wide_plan_that_cannot_win_never_runs():
    world = World(draft_agrees=0.1, row_cost=0.02)
    planner = Planner([TWO_4, TWO_8])
    chosen = world.run(planner, 2000, 16)
    assert set(chosen[:1000]) == {PLAIN, TWO_4}
    assert set(chosen[1000:]) == {PLAIN}


@pytest.mark.parametrize(("batch_size", "share"), [(1, 0.04), (16, 0.02)])
def test_learning_takes_few_hundredths_of_the_time_behind_the_start(batch_size, share):
    """Trials that lose and looks that find nothing where plain is best; one request is counted slowly."""
    world = World(draft_agrees=0.3, row_cost=0.05, look_s=2e-5, noise=0.2)
    planner = Planner([*PLANS, *LOOKED_UP])
    chosen = world.run(planner, 3000, batch_size)
    plain_s = world.seconds(PLAIN, batch_size)
    lost_s = sum(
        world.seconds(plan, batch_size) - world.tokens(plan) * plain_s for plan in chosen if plan != PLAIN
    )
    looks_s = world.num_looks * world.look_s * batch_size
    assert lost_s + looks_s < (share * 3000 + 15) * plain_s
    assert world.num_looks > 5


@pytest.mark.parametrize("batch_size", [1, 8, 32, 128])
def test_a_short_run_on_a_machine_never_met_stays_within_three_hundredths_of_plain(batch_size):
    """Forwards that draft cost twice what the line expects, and looks a tenth of a step."""
    world = World(draft_agrees=0.4, row_cost=0.01)
    fair = world.seconds
    world.seconds = lambda plan, *place: fair(plan, *place) * (1 if plan == PLAIN else 2)
    world.look_s = 0.1 * fair(PLAIN, batch_size) / batch_size
    planner = Planner([*PLANS, *LOOKED_UP])
    plain_s, chosen = fair(PLAIN, batch_size), []
    for num_steps in (120, 320):
        chosen += world.run(planner, num_steps - len(chosen), batch_size)
        lost_s = sum(
            world.seconds(plan, batch_size) - world.tokens(plan) * plain_s for plan in chosen if plan != PLAIN
        )
        looks_s = world.num_looks * world.look_s * batch_size
        assert lost_s + looks_s < 0.03 * num_steps * plain_s, Counter(chosen)


def test_a_plain_step_is_chosen_for_many_until_something_else_may_be():
    world, planner = World(draft_agrees=0.1, look_s=1e-3), Planner([*PLANS, *LOOKED_UP])
    world.run(planner, 400, 8)
    asked, choose = [], planner.choose
    planner.choose = lambda step: asked.append(choose(step)) or asked[-1]
    world.run(planner, 200, 8)
    assert len(asked) < 200 / 8
    assert sum(choice.num_steps for choice in asked) >= 200


def test_a_choice_holds_no_longer_than_its_context_stays_at_its_place():
    planner = Planner(LOOKED_UP)
    World().run(planner, 400, 8)
    for context in (64, 65, 100, 127, 128, 129):
        step = NextStep(batch_size=8, context=context, least_saved=4, outlook=lambda *asked: [()] * 8)
        edge = 64 if context <= 64 else 128 if context <= 128 else 256
        assert 1 <= planner.choose(step).num_steps <= edge - context + 1


def test_a_choice_goes_on_at_another_batch_of_its_place_and_nothing_is_looked_up_for_it():
    world, planner, looks = World(look_s=1e-3), Planner(LOOKED_UP), []
    world.run(planner, 399, 8)

    def choose(batch_size, **joining):
        outlook = lambda *asked: looks.append(asked) or [()] * batch_size  # noqa: E731
        return planner.choose(
            NextStep(batch_size=batch_size, context=72, least_saved=4, outlook=outlook, **joining)
        )

    assert choose(8).num_steps > 1
    looks.clear()
    assert choose(7).num_steps > 1
    assert not looks


def test_a_join_is_looked_up_at_once_if_that_is_paid_for():
    asked = []
    for look_s in (1e-6, 1.0):
        world, planner = World(look_s=look_s), Planner(LOOKED_UP)
        world.run(planner, 400, 8)
        before = world.num_looks
        step = NextStep(
            batch_size=8,
            context=72,
            num_joining=1,
            least_saved=4,
            outlook=lambda name, *asked, world=world: world.outlook(8, *asked),
        )
        planner.choose(step)
        asked.append(world.num_looks - before)
    assert asked == [1, 0]


def test_a_plan_never_tried_is_hoped_to_commit_most_of_its_drafts():
    planner = Planner([TWO_4, TWO_8])
    assert (planner.expected_tokens(TWO_4), planner.expected_tokens(TWO_8)) == pytest.approx((3.4, 5.8))
    planner.load_state_dict({TWO_4.name: [1600, 3200, 0, 0]})
    assert planner.expected_tokens(TWO_4) == pytest.approx(2, abs=0.02)
    assert planner.expected_tokens(TWO_8) == pytest.approx(3, abs=0.04)  # 1 + 8 drafts, a quarter accepted
    assert planner.expected_tokens(PLAIN) == 1


def test_a_fall_in_acceptance_brings_plain_back_and_a_rise_is_found_again():
    world, planner = World(draft_agrees=0.8, row_cost=0.01), Planner([TWO_8])
    assert most_common(world.run(planner, 1000, 8)[-50:]) == TWO_8
    world.draft_agrees = 0.05
    assert most_common(world.run(planner, 1000, 8)[-100:]) == PLAIN
    world.draft_agrees = 0.8
    assert most_common(world.run(planner, 11_000, 8)[-100:]) == TWO_8


def test_each_request_gets_the_drafts_that_are_worth_their_rows():
    """A draft of one chance in ten pays where rows are nearly free, and none where they cost three."""
    for row_cost, longest in ((0.001, 16), (0.05, 2), (3.0, 0)):
        world = World(row_cost=row_cost, chances=(0.9, 0.8, *[0.1 * 0.9**i for i in range(14)]))
        planner = Planner(LOOKED_UP)
        world.run(planner, 100, 4)
        plan = most_common(world.run(planner, 20, 4))
        assert plan.num_drafts <= longest
        assert (plan == PLAIN) == (longest == 0)
        if plan != PLAIN:
            assert max(world.lengths or [2]) <= longest


def test_history_that_promises_nothing_leaves_plain_steps_and_is_asked_seldom():
    world, planner = World(look_s=1e-4), Planner(LOOKED_UP)
    chosen = world.run(planner, 1000, 8)
    assert set(chosen) == {PLAIN}
    assert 2 < world.num_looks < 40


def test_a_history_that_promises_too_much_is_believed_less():
    world, planner = World(row_cost=0.05, chances=(0.9,) * 8), Planner(LOOKED_UP)
    world.draw_tokens = lambda plan, length: 1
    chosen = world.run(planner, 2000, 8)
    assert chosen[-500:].count(PLAIN) > 480


def test_history_takes_over_from_mask_rows_where_it_expects_more():
    world, planner = World(draft_agrees=0.5, row_cost=0.005, seed=1), Planner([FUSED_8, *LOOKED_UP])
    assert most_common(world.run(planner, 800, 4)[-50:]) == FUSED_8
    world.chances = (0.95,) * 12
    assert [plan.drafter for plan in world.run(planner, 60, 4)[-20:]].count("history") >= 17
    world.chances = ()
    assert most_common(world.run(planner, 60, 4)) == FUSED_8


def test_predicted_and_achieved_speedups_agree_with_the_worlds():
    world, planner = World(row_cost=0.02, noise=0.1, chances=(0.8, 0.7, 0.6, 0.5)), Planner(LOOKED_UP)
    chosen = world.run(planner, 600, 2)
    assert most_common(chosen) == LOOKED_UP[2]
    true = (1 + 0.8 + 0.7 + 0.6 + 0.5) * world.seconds(PLAIN, 2) / world.seconds(LOOKED_UP[2], 2)
    predicted, achieved = planner.speedups
    assert predicted == pytest.approx(true, rel=0.15)
    assert achieved == pytest.approx(true, rel=0.15)


@pytest.mark.parametrize("chance", [0.2, 0.6, 0.95])
def test_the_achieved_speedup_is_what_was_measured_whatever_the_cost_model_says(chance):
    """Looks and trials included, on a machine that slows down threefold, with costs that are wrong."""
    world = World(row_cost=0.02, noise=0.2, chances=(chance,) * 8, look_s=1e-4)
    planner, fair, steps = Planner([*PLANS, *LOOKED_UP]), world.seconds, itertools.count()
    planner.costs.cost = lambda work: 1.0
    slow, plain_s, total_s, num_tokens = [1.0], [], [], []

    def seconds(plan, batch_size, context=64):
        slow[0] = 3.0 if next(steps) // 400 % 2 else 1.0
        return slow[0] * fair(plan, batch_size, context)

    def observe(taken, tell=planner.observe):
        # Noise makes them a tenth longer.
        plain_s.append(1.1 * slow[0] * fair(PLAIN, 4))
        total_s.append(taken.seconds + taken.choice_seconds)
        num_tokens.append(taken.num_tokens)
        tell(taken)

    world.seconds, planner.observe = seconds, observe
    world.run(planner, 1600, 4)
    measured = sum(tokens * s for tokens, s in zip(num_tokens, plain_s, strict=True)) / 4 / sum(total_s)
    assert planner.speedups[1] == pytest.approx(measured, rel=0.2)


def test_a_policy_that_cannot_draft_has_history_and_decodes_plain_where_that_is_silent():
    policy = random_policy()
    policy.mask_token_id = None
    assert candidate_plans(policy) == (PLAIN, *LOOKED_UP)
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
    assert [plan.name for plan in candidate_plans(policy) if plan not in LOOKED_UP] == names


def test_the_draft_forwards_that_start_fused_plans_count():
    """Half of the time of every step in use: the plan takes twice what its steps show."""
    planner = Planner([FUSED_8])
    before = planner.speedup(FUSED_8, 8, 64)
    planner.load_state_dict({FUSED_8.name: [0, 0, 0.1, 0.1]})
    assert planner.speedup(FUSED_8, 8, 64) == pytest.approx(before / 2)


def test_every_switch_is_logged_with_the_expectation_of_both(caplog):
    caplog.set_level(logging.INFO)
    world, planner = World(row_cost=0.0005), Planner([TWO_8])
    world.run(planner, 1000, 8)
    (message,) = caplog.messages
    assert re.fullmatch(
        r"plan two_forward\(8\) after plain at batch 8, context 72: expected [\d.]+x plain, against 1x",
        message,
    )


def test_the_config_names_a_plan_or_leaves_it_to_a_planner(cache_folder):
    policy = random_policy()
    assert read_plan("fixed:two_forward", policy) == TWO_4
    planner = read_plan("auto", policy)
    assert isinstance(planner, Planner)
    assert planner.name == "auto"
    assert set(planner.candidates) == set(candidate_plans(policy))
    assert planner.costs.path == cache_folder / "plans" / f"{cost_key(policy)}.json"
    with pytest.raises(InvalidInput, match="plan must be"):
        read_plan("automatic", policy)


def test_the_key_of_a_cost_table_follows_the_architecture_and_not_the_weights():
    keys = [cost_key(random_policy(seed=0)), cost_key(random_policy(seed=1))]
    assert keys[0] == keys[1]
    half, unpacked = HFPolicy(random_model().bfloat16()), HFPolicy(random_model(), prepack="off")
    own_layers = HFPolicy(random_model(), compile="off")
    others = [half, unpacked, own_layers, random_policy("qwen3"), adapted_policy()]
    assert len({keys[0], *map(cost_key, others)}) == 6


def test_drafts_that_the_context_cannot_hold_are_no_candidates():
    policy = random_policy()
    policy.trained_drafts = 0
    policy.max_length = 5
    assert candidate_plans(policy) == (PLAIN, *LOOKED_UP[:3])
    assert candidate_plans(policy, with_history=False) == (PLAIN,)


def test_a_plan_is_used_for_what_it_has_committed_and_not_for_what_was_hoped():
    """Thirteen request-steps of 1.3 tokens: with the hope at the start they would be 2.1."""
    planner = Planner([TWO_8])
    planner.costs.cost = lambda work: 1.0 if work.is_plain else 1.6
    planner.load_state_dict({TWO_8.name: [13, 17, 0, 0]})
    assert planner.speedup(TWO_8, 8, 72) > 1.05
    planner._trials.add(1e9)  # nothing is paid for
    assert TWO_8 not in World(draft_agrees=0.3).run(planner, 60, 8)
    planner.load_state_dict({TWO_8.name: [1300, 3000, 0, 0]})
    assert TWO_8 in World(draft_agrees=0.6).run(planner, 60, 8)


def test_no_plan_is_tried_in_a_step_that_a_prefill_begins():
    world, planner = World(row_cost=0.0005), Planner([TWO_8])
    planner._plain_steps = 1e6  # all is paid for
    world.run(planner, 3, 8)
    step = NextStep(batch_size=8, context=72, least_saved=4, num_joining=8, outlook=lambda *asked: None)
    assert planner.choose(step).plan == PLAIN
    assert TWO_8 in world.run(planner, 10, 8)


def test_what_is_not_expected_to_lose_is_tried_at_once():
    """Costs that earlier processes have measured say that it pays."""
    planner = Planner([TWO_8])
    World(row_cost=0.0005).run(planner, 1000, 8)
    fresh = Planner([TWO_8], costs=planner.costs)
    assert TWO_8 in World(row_cost=0.0005).run(fresh, 12, 8)
