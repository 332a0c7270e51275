"""Plans: what they are called, what is read from it, and which drafter they name."""

import pytest

from blockroll.errors import InvalidInput
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.planning.costs import CostModel, Work
from blockroll.rollout.planning.planner import Planner
from blockroll.types import DRAFTERS, MASK_ROWS, PLAIN, Plan, PlanKind

OTHER = "suffixes"


def plans_of(drafter):
    """Every kind of plan that a drafter has."""
    plans = [Plan(1, drafter=drafter), Plan(8, drafter=drafter)]
    return [*plans, Plan(8, (0,)), Plan(8, (0, 3, 8))] if drafter == MASK_ROWS else plans


@pytest.mark.parametrize("drafter", [*DRAFTERS, OTHER])
def test_every_plan_of_every_drafter_is_read_from_what_it_prints(drafter):
    for plan in [PLAIN, *plans_of(drafter)]:
        assert str(plan) == plan.name
        assert Plan.parse(str(plan), default_drafts=5, drafters=[drafter]) == plan
        assert Plan.parse(f"fixed:{plan}", default_drafts=5, drafters=None) == plan


def test_plans_are_read_by_the_drafters_that_engines_have():
    assert {make().name for make in Engine.own_drafters} == {*DRAFTERS}
    with pytest.raises(InvalidInput, match="plan must be 'plain'"):
        Plan.parse(f"{OTHER}(4)", default_drafts=5)
    assert Plan.parse(OTHER, default_drafts=5, drafters=[OTHER]) == Plan(5, drafter=OTHER)


@pytest.mark.parametrize(
    "text", [f"{OTHER}(0)", f"{OTHER}(4,[0])", f"{OTHER}(-1)", "auto", "fixed:", "plain(1)"]
)
def test_what_is_no_plan_of_a_drafter_is_refused(text):
    with pytest.raises(InvalidInput):
        Plan.parse(text, default_drafts=5, drafters=None)


def test_a_plan_of_history_that_says_no_k_has_one_of_its_own():
    """A policy that never learned to draft says none."""
    assert Plan.parse("history", default_drafts=1) == Plan(8, drafter="history")
    assert Plan.parse("history(3)", default_drafts=1) == Plan(3, drafter="history")
    with pytest.raises(InvalidInput, match=r"'history\(K\)'"):
        Plan.parse("histories(3)", default_drafts=1)


def test_a_plan_without_drafts_has_no_drafter():
    with pytest.raises(InvalidInput, match="a plan of 0 drafts has no drafter, got 'suffixes'"):
        Plan(0, drafter=OTHER)
    assert PLAIN.drafter == ""
    assert Plan(0) == PLAIN
    assert PLAIN.kind is PlanKind.PLAIN
    assert Plan(3, drafter=MASK_ROWS) == Plan(3)


@pytest.mark.parametrize("name", ["plain", "two_forward", "fused", "auto", "two words", "a(1)", "4"])
def test_a_drafters_name_cannot_be_read_as_another_plan(name):
    with pytest.raises(InvalidInput, match="a drafter's name is letters"):
        Plan(3, drafter=name)


def test_a_planner_guesses_a_drafters_tokens_by_that_drafter_alone():
    """What another drafter's shorter drafts were accepted for says nothing of these."""
    short, long = Plan(2, drafter="first"), Plan(4, drafter="second")
    planner = Planner([short, long])
    planner.load_state_dict({short.name: [50, 50, 0, 0]})  # none was ever accepted
    assert planner.expected_tokens(long) == pytest.approx(3.4)
    assert planner.expected_tokens(short) < 1.5


def test_costs_and_the_counts_of_a_planner_keep_the_plans_of_any_drafter(tmp_path):
    plan = Plan(4, drafter=OTHER)
    model, work = CostModel(tmp_path / "costs.json"), Work.of(plan, 1, 64)
    for seconds in (1.0, 1.0, 1.0, 1.5, 1.5, 1.0, 1.5):
        model.observe(work if seconds > 1 else work.plain, seconds)
    model.save()
    assert CostModel.load(tmp_path / "costs.json").num_samples(work) == model.num_samples(work) == 2
    planner, again = Planner([plan]), Planner([plan])
    planner.load_state_dict({plan.name: [10, 30, 0, 0]})
    again.load_state_dict(planner.state_dict())
    assert again.expected_tokens(plan) == planner.expected_tokens(plan) > 3
