"""Texts whose drafts are point masses are those of plain decoding: any plan, batch, replica, interruption."""

import dataclasses

import pytest

from blockroll.config import RolloutConfig
from blockroll.errors import ConfigError, InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.audit.check import check_audit
from blockroll.rollout.audit.writer import AuditWriter
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.planning.costs import CostModel, Work
from blockroll.rollout.planning.planner import Planner
from blockroll.rollout.pool.makers import replica_around
from blockroll.rollout.pool.pool import RolloutPool
from blockroll.types import Law, Plan, Sampling
from tests.engines import PlansInTurn, make_requests, run
from tests.equality import assert_same_rollouts
from tests.models import prompts, random_policy

HISTORY = Plan(6, drafter="history")
PLANS = [HISTORY, Plan(4), Plan(4, (0, 2, 4))]
SAMPLING = Sampling(max_tokens=16, ignore_eos=True, draft_temperature=0)
NEAR_TIES = 2


@pytest.fixture(scope="module")
def policy():
    return random_policy()


@pytest.fixture(scope="module")
def requests():
    """A hundred, in groups of four siblings."""
    starts = prompts(25)
    made = make_requests([starts[index // 4] for index in range(100)], SAMPLING)
    return [dataclasses.replace(each, group_id=f"g{index // 4}") for index, each in enumerate(made)]


@pytest.fixture(scope="module")
def plain(policy, requests):
    return run(policy, requests, Plan(0), max_batch_size=32)


def among(rollouts, requests):
    return {request.request_id: rollouts[request.request_id] for request in requests}


@pytest.mark.parametrize(("batch", "count"), [(1, 6), (3, 24), (16, 100)])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_texts_are_those_of_plain_decoding_whatever_is_drafted(policy, requests, plain, plan, batch, count):
    some = requests[:count]
    drafted = run(policy, some, plan, max_batch_size=batch)
    assert_same_rollouts(among(plain, some), drafted, policy, at_most=NEAR_TIES)
    assert sum(rollout.stats.num_drafted for rollout in drafted.values()) > 0


def test_texts_are_those_of_plain_decoding_when_plans_change_at_every_step(policy, requests, plain):
    turns = PlansInTurn(HISTORY, Plan(4), Plan(0), Plan(2, (0, 2)), Plan(4, (0, 2, 4)))
    assert_same_rollouts(plain, run(policy, requests, turns, max_batch_size=16), policy, at_most=NEAR_TIES)


def test_texts_are_those_of_plain_decoding_under_auto(policy, requests, plain):
    costs = CostModel()
    for plan in (Plan(0), *PLANS) * 4:  # a machine that is known to draft for nothing
        costs.observe(Work.of(plan, 16, 32), 1e-3)
    planner = Planner([*PLANS, Plan(0)], costs=costs)
    engine = Engine(policy, plan=planner, max_batch_size=16, reproducible=True)
    engine.submit(requests)
    finished = []
    while engine.num_requests:
        finished += engine.step().finished
    assert_same_rollouts(plain, finished, policy, at_most=NEAR_TIES)
    assert len({plan for rollout in finished for plan, _ in rollout.stats.steps_by_plan}) > 1


def test_requests_that_draw_their_drafts_change_no_neighbour_whose_drafts_are_certain(
    policy, requests, plain
):
    drawn = dataclasses.replace(SAMPLING, draft_temperature=1.0)
    mixed = [
        dataclasses.replace(request, sampling=drawn) if index % 3 == 0 else request
        for index, request in enumerate(requests[:48])
    ]
    certain = [request for request in mixed if request.sampling is not drawn]
    for plan in PLANS[1:]:
        rollouts = run(policy, mixed, plan, max_batch_size=7)
        assert_same_rollouts(among(plain, certain), among(rollouts, certain), policy, at_most=NEAR_TIES)
        assert (
            sum(rollouts[each.request_id].token_ids != plain[each.request_id].token_ids for each in mixed)
            > 10
        )


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_texts_that_are_aborted_go_on_as_they_would_have(policy, requests, plain, plan):
    some = requests[:32]
    engine = Engine(policy, plan=plan, max_batch_size=8)
    engine.submit(some)
    finished = []
    for _ in range(5):
        finished += engine.step().finished
    left = engine.abort([request.request_id for request in some])
    assert any(rollout.token_ids for rollout in left)
    resumed = [dataclasses.replace(each.request, prefix=each.as_prefix()) for each in left]
    behind = run(policy, resumed, Plan(3), max_batch_size=5)
    whole = [
        dataclasses.replace(each, request=among(plain, [each.request])[each.request.request_id].request)
        for each in (*finished, *behind.values())
    ]
    assert_same_rollouts(among(plain, some), whole, policy, at_most=NEAR_TIES)


def test_two_replicas_give_the_texts_of_one_engine(policy, requests, plain):
    config = RolloutConfig(backend="local", plan="history(6)", max_batch_size=5)
    replicas = [replica_around(policy, config, replica_id=number) for number in range(2)]
    with RolloutPool(replicas) as pool:
        rollouts = list(pool.generate(requests[:40]))
    assert_same_rollouts(among(plain, requests[:40]), rollouts, policy, at_most=NEAR_TIES)


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("plan", [*PLANS, None], ids=str)
def test_audits_pass_at_both_levels_and_tell_the_coins_apart(policy, requests, tmp_path, plan, weight):
    sampling = dataclasses.replace(SAMPLING, law=Law(weight))
    drawn = dataclasses.replace(sampling, draft_temperature=None)
    served = [
        dataclasses.replace(request, sampling=drawn if index % 2 else sampling)
        for index, request in enumerate(requests[:16])
    ]
    writer = AuditWriter(tmp_path)
    run(policy, served, plan or PlansInTurn(*PLANS, Plan(0)), max_batch_size=6, observers=(writer,))
    report = check_audit(sorted(tmp_path.glob("*.parquet")), policy_of=lambda version: policy)
    assert report.problem is None, report.problem
    assert report.recomputed == {0: report.num_rows}
    assert report.num_rows == 16 * 16


@pytest.mark.parametrize(
    ("options", "num_drafters"),
    [({}, 3), ({"reproducible": True}, 2), ({"reproducible": True, "temperature": 0.0}, 3)],
)
def test_a_reproducible_auto_leaves_out_what_would_depend_on_its_choices(options, num_drafters):
    policy = HFPolicy.from_pretrained("tiny")
    engine = replica_around(policy, RolloutConfig(backend="local", **options)).engine
    assert len({plan.drafter for plan in engine.planner.candidates}) == num_drafters


def test_a_request_whose_text_would_depend_on_the_choice_is_refused_at_the_door(policy):
    engine = Engine(policy, plan=Planner([Plan(4)]), reproducible=True)
    for wrong in ({"draft_temperature": 0.5}, {}, {"draft_temperature": 0, "law": Law(0.5)}):
        with pytest.raises(InvalidInput, match="give it draft_temperature=0 and an unmixed law"):
            engine.submit(make_requests(prompts(1), Sampling(**wrong)))
    engine.submit(make_requests(prompts(1), Sampling(temperature=0)))
    for plan in (Planner([HISTORY]), Plan(4)):
        Engine(policy, plan=plan, reproducible=True).submit(make_requests(prompts(1), Sampling()))


def test_a_reproducible_auto_that_mixes_is_no_configuration():
    with pytest.raises(ConfigError, match="never mixes"):
        RolloutConfig(reproducible=True, mix_weight=0.5)
    RolloutConfig(reproducible=True, mix_weight=0.5, plan="two_forward(4)")


@pytest.mark.parametrize("with_history", [False, True])
def test_a_seed_that_serves_again_meets_no_drawn_coin_twice_where_its_text_may_be_looked_up(
    policy, requests, with_history
):
    """Without history nothing that its coins have drawn can come back as a draft, and they may."""
    served: list[set[float]] = []

    def remember(trace):
        if trace.plan.drafter == "mask_rows":
            served[-1].update(trace.verify_uniforms_BL.flatten().tolist())

    sampling = dataclasses.replace(SAMPLING, draft_temperature=None)
    some = [dataclasses.replace(request, sampling=sampling) for request in requests[:6]]
    plans = (Plan(4), HISTORY if with_history else Plan(0))
    engine = Engine(policy, plan=PlansInTurn(*plans), observers=(remember,))
    for _ in range(2):
        served.append(set())
        engine.submit(some)
        while engine.num_requests:
            engine.step()
    assert min(map(len, served)) > 50
    assert bool(served[0] & served[1]) != with_history
