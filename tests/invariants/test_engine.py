"""What an engine must not depend on, and what every rollout must satisfy."""

import dataclasses
import itertools

import pytest
import torch

from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.planning.planner import Planner
from blockroll.samplers import uniforms
from blockroll.samplers.uniforms import philox4x32
from blockroll.types import Law, Plan, Sampling
from tests.engines import PlansInTurn, causal_logprobs, make_requests, run
from tests.equality import assert_same_rollouts
from tests.models import EOS_ID, FAMILIES, adapted_policy, prompts, random_policy

PLAIN, TWO_FORWARD, FUSED = Plan(0), Plan(4), Plan(4, (0, 2, 4))
LEVEL_SETS = [(0,), (0, 4), (0, 2, 4), (0, 1, 2, 3, 4)]
PLANS = pytest.mark.parametrize("plan", [PLAIN, TWO_FORWARD, FUSED], ids=lambda plan: plan.name)
SWITCHES = [
    (PLAIN, TWO_FORWARD, FUSED),
    (FUSED, Plan(3, (0, 3)), Plan(4, (0,)), TWO_FORWARD),
    (Plan(2, (0,)), FUSED, FUSED, PLAIN),
]
FUSED_PLANS = pytest.mark.parametrize(
    "plan", [Plan(4, levels) for levels in LEVEL_SETS], ids=lambda p: p.name
)


@pytest.fixture(scope="module")
def policy():
    return random_policy()


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("plain", PLAIN),
        ("two_forward", Plan(8)),
        ("fixed:two_forward(4)", TWO_FORWARD),
        ("fused", Plan(8, (0, 8))),
        ("fused(4)", Plan(4, (0, 4))),
        ("fused(4, [0, 2, 4])", FUSED),
    ],
)
def test_plans_are_read_as_they_are_written(text, plan):
    assert Plan.parse(text, default_drafts=8) == plan
    assert Plan.parse(plan.name, default_drafts=3) == plan


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_two_forward_equals_greedy_plain(family):
    policy = random_policy(family)
    requests = make_requests(prompts(60), Sampling(temperature=0, max_tokens=20))
    plain, two_forward = run(policy, requests, PLAIN), run(policy, requests, TWO_FORWARD)
    assert_same_rollouts(plain, two_forward, policy)
    assert sum(rollout.stats.num_accepted for rollout in two_forward.values()) > 0


@FUSED_PLANS
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_fused_equals_greedy_plain(family, plan):
    policy = adapted_policy(family)
    requests = make_requests(prompts(16), Sampling(temperature=0, max_tokens=16))
    plain, fused = run(policy, requests, PLAIN), run(policy, requests, plan)
    assert_same_rollouts(plain, fused, policy)
    assert sum(rollout.stats.num_drafted for rollout in fused.values()) > 0


@FUSED_PLANS
def test_fused_drafts_count_forwards_and_drafts(policy, plan):
    """One forward a step and one to begin with; never more drafts than K, fewer where no level fits."""
    rollouts = run(policy, make_requests(prompts(20), Sampling(max_tokens=20)), plan)
    for rollout in rollouts.values():
        stats = rollout.stats
        assert stats.num_verify_steps <= stats.num_forwards - 1
        assert 0 < stats.num_drafted <= 4 * stats.num_verify_steps
    drafts = sum(rollout.stats.num_drafted for rollout in rollouts.values())
    steps = sum(rollout.stats.num_forwards - 1 for rollout in rollouts.values())
    assert (drafts == 4 * steps) == (len(plan.levels) == 5)


def test_one_request_may_mix_while_its_neighbours_stay_lossless(policy):
    """w = 1 beside a mixed request: what a batch draws where nobody mixes."""
    lossless = make_requests(prompts(8), Sampling(max_tokens=16))
    mixed = [
        dataclasses.replace(r, sampling=Sampling(max_tokens=16, law=Law(0.3))) if i % 4 == 1 else r
        for i, r in enumerate(lossless)
    ]
    for plan in (TWO_FORWARD, FUSED):
        want, got = run(policy, lossless, plan), run(policy, mixed, plan)
        beside = [request.request_id for i, request in enumerate(lossless) if i % 4 != 1]
        assert_same_rollouts(
            {name: want[name] for name in beside}, {name: got[name] for name in beside}, policy
        )
        for request in lossless:
            theirs = got[request.request_id]
            if request.request_id not in beside:
                assert theirs.law.name == "mixed(0.3)"
                assert theirs.behavior_logprobs != theirs.policy_logprobs
                assert 0 < theirs.effective_sample_size < 1
                assert abs(theirs.log_ratio) > 1e-3
                want_logprobs = causal_logprobs(policy, theirs)
                got_logprobs = torch.tensor(theirs.policy_logprobs).double()
                torch.testing.assert_close(got_logprobs, want_logprobs, atol=1e-4, rtol=0)
            else:
                assert theirs.effective_sample_size == pytest.approx(1)
                assert theirs.log_ratio == pytest.approx(0, abs=1e-9)


def joining_and_leaving(sampling):
    """Requests of different lengths, for an engine that runs few of them together."""
    lengths = (3, 17, 8, 30, 11)
    return [
        dataclasses.replace(
            request, sampling=dataclasses.replace(request.sampling, max_tokens=lengths[i % len(lengths)])
        )
        for i, request in enumerate(make_requests(prompts(24), sampling))
    ]


@pytest.mark.parametrize("plans", SWITCHES, ids=lambda plans: "-".join(plan.name for plan in plans))
def test_switching_plans_at_every_step_changes_no_greedy_token(policy, plans):
    requests = joining_and_leaving(Sampling(temperature=0))
    planner = PlansInTurn(*plans)
    switched = run(policy, requests, planner, max_batch_size=5)
    assert_same_rollouts(run(policy, requests, PLAIN), switched, policy)
    assert {plan for plan, *_ in planner.observed} == set(plans)
    assert any(len(rollout.stats.steps_by_plan) == len(set(plans)) for rollout in switched.values())


@pytest.fixture
def coins(monkeypatch):
    """The Philox words of every uniform that engines draw, in order."""
    words = []

    def remember(seed, c0, c1, c2, c3):
        columns = torch.broadcast_tensors(*map(torch.as_tensor, (seed, c0, c1, c2, c3)))
        words.extend(zip(*(column.flatten().tolist() for column in columns), strict=True))
        return philox4x32(seed, c0, c1, c2, c3)

    monkeypatch.setattr(uniforms, "philox4x32", remember)
    return words


@pytest.mark.parametrize("plans", SWITCHES, ids=lambda plans: "-".join(plan.name for plan in plans))
def test_switching_plans_keeps_exact_logprobs_and_uses_no_coin_twice(policy, plans, coins):
    requests = joining_and_leaving(Sampling())
    for rollout in run(policy, requests, PlansInTurn(*plans), max_batch_size=5).values():
        want = causal_logprobs(policy, rollout)
        torch.testing.assert_close(torch.tensor(rollout.policy_logprobs).double(), want, atol=1e-4, rtol=0)
        assert rollout.behavior_logprobs == pytest.approx(rollout.policy_logprobs, abs=1e-9)
    assert len(coins) > 500
    assert len(set(coins)) == len(coins)


def test_a_plan_whose_forwards_are_not_counted_would_use_coins_twice(policy, coins, monkeypatch):
    monkeypatch.setattr(Plan, "forwards_per_step", property(lambda plan: int(plan.layout is None)))
    run(policy, joining_and_leaving(Sampling()), TWO_FORWARD, max_batch_size=5)
    assert len(set(coins)) < len(coins)


def test_a_planner_is_told_what_each_whole_step_was_and_committed(policy):
    """But not of a first step that the prefill took a part of."""
    planner = PlansInTurn(PLAIN, TWO_FORWARD)
    requests = make_requests(prompts(3), Sampling(max_tokens=9, ignore_eos=True))
    rollouts = run(policy, requests, planner)
    longest = max(len(request.prompt_ids) for request in requests)
    ran, size, context, num_tokens = planner.observed[0]
    assert (ran, size, context) == (TWO_FORWARD, 3, longest + 1)
    assert num_tokens >= 3 * 2
    assert sum(num_tokens for *_, num_tokens in planner.observed) == 27 - 3
    counts = [dict(rollout.stats.steps_by_plan) for rollout in rollouts.values()]
    for plan in (PLAIN, TWO_FORWARD):
        steps = sum(batch_size for ran, batch_size, *_ in planner.observed if ran == plan)
        assert sum(count[plan] for count in counts) == steps + 3 * (plan == PLAIN)


def test_a_planner_finds_the_plan_that_its_engine_runs_fastest(policy):
    """By a clock on which every step takes equally long, that is a plan that drafts."""
    ticks = itertools.count()
    planner = Planner([TWO_FORWARD])
    requests = make_requests(prompts(240), Sampling(max_tokens=40, ignore_eos=True))
    engine = Engine(policy, plan=planner, max_batch_size=8, clock=lambda: 1e-3 * next(ticks))
    engine.submit(requests)
    chosen = []
    while engine.num_requests:
        engine.step()
        chosen.append(engine.plan)
    assert chosen[0] == PLAIN
    assert chosen[600:].count(TWO_FORWARD) > 0.75 * len(chosen[600:])  # trials are paid for before


@pytest.mark.parametrize("plan", [TWO_FORWARD, Plan(4, (0, 1, 2, 3, 4))], ids=lambda plan: plan.name)
def test_weight_zero_accepts_every_draft(policy, plan):
    sampling = Sampling(max_tokens=30, ignore_eos=True, law=Law(0.0))
    for rollout in run(policy, make_requests(prompts(6), sampling), plan).values():
        assert rollout.stats.num_accepted >= rollout.stats.num_drafted - 4  # the end may cut a block


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
@PLANS
def test_policy_logprobs_equal_a_fresh_causal_forward(policy, plan, temperature):
    requests = make_requests(prompts(40), Sampling(temperature=temperature, max_tokens=16))
    for rollout in run(policy, requests, plan, max_batch_size=16).values():
        want = causal_logprobs(policy, rollout)
        torch.testing.assert_close(torch.tensor(rollout.policy_logprobs).double(), want, atol=1e-4, rtol=0)
        if temperature:
            assert rollout.behavior_logprobs == pytest.approx(rollout.policy_logprobs, abs=1e-9)
        else:
            assert set(rollout.behavior_logprobs) == {0.0}


@pytest.mark.failure(54)
@PLANS
def test_a_batch_gives_the_tokens_each_request_gets_alone(policy, plan):
    requests = make_requests(prompts(24), Sampling(max_tokens=20))
    alone = {}
    for request in requests:
        alone |= run(policy, [request], plan)
    together = run(policy, requests, plan)
    joining = run(policy, reversed(requests), plan, max_batch_size=5)
    assert_same_rollouts(alone, together, policy)
    assert_same_rollouts(alone, joining, policy)


@pytest.mark.failure(55)
@pytest.mark.parametrize("plan", [PLAIN, TWO_FORWARD], ids=lambda plan: plan.name)
def test_a_request_aborted_at_every_step_and_resumed_equals_the_uninterrupted_one(policy, plan):
    requests = make_requests(prompts(8), Sampling(max_tokens=24))
    whole = run(policy, requests, plan)
    resumed = {}
    for request in requests:
        while request is not None:
            engine = Engine(policy, plan=plan)
            engine.submit([request])
            finished = engine.step().finished
            if finished:
                resumed[request.request_id] = finished[0]
                request = None
            else:
                (aborted,) = engine.abort([request.request_id])
                assert aborted.finish_reason == "abort"
                assert engine.num_requests == 0
                request = dataclasses.replace(request, prefix=aborted.as_prefix())
    near_ties = assert_same_rollouts(whole, resumed, policy)
    for request_id in whole.keys() - near_ties:
        prefilled_again = {"num_prefilled": resumed[request_id].stats.num_prefilled}
        assert resumed[request_id].stats == dataclasses.replace(whole[request_id].stats, **prefilled_again)


@pytest.mark.failure(56)
def test_seeds_change_tokens_and_equal_seeds_repeat_them(policy):
    texts = [prompts(1)[0]] * 8
    sampling = Sampling(max_tokens=16, ignore_eos=True)
    first = run(policy, make_requests(texts, sampling, seed=1), TWO_FORWARD)
    again = run(policy, make_requests(texts, sampling, seed=1), TWO_FORWARD)
    other = run(policy, make_requests(texts, sampling, seed=2), TWO_FORWARD)
    assert_same_rollouts(first, again, policy)
    assert len({r.token_ids for r in (*first.values(), *other.values())}) == 16


@PLANS
def test_every_column_of_a_rollout_has_one_entry_per_token(policy, plan):
    rollouts = run(policy, make_requests(prompts(30), Sampling(max_tokens=9)), plan, policy_version=7)
    for rollout in rollouts.values():
        columns = (rollout.policy_logprobs, rollout.behavior_logprobs, rollout.policy_versions)
        assert {len(column) for column in columns} == {len(rollout.token_ids)}
        assert set(rollout.policy_versions) == {7}
        assert rollout.law.name == "target"
        assert rollout.stats.num_accepted <= rollout.stats.num_drafted
        assert rollout.stats.num_forwards >= plan.forwards_per_step


@PLANS
def test_rollouts_end_at_stop_tokens_at_max_tokens_and_at_the_context(policy, plan):
    ends = {"stop": 0, "length": 0}
    for rollout in run(policy, make_requests(prompts(60), Sampling(max_tokens=10)), plan).values():
        ends[rollout.finish_reason] += 1
        assert EOS_ID not in rollout.token_ids[:-1]
        assert (rollout.token_ids[-1] == EOS_ID) == (rollout.finish_reason == "stop")
        assert rollout.finish_reason == "stop" or len(rollout.token_ids) == 10
    assert all(ends.values())
    unbounded = Sampling(max_tokens=1000, ignore_eos=True)
    for rollout in run(policy, make_requests(prompts(6), unbounded), plan, max_length=32).values():
        assert len(rollout.request.prompt_ids) + len(rollout.token_ids) == 32


@pytest.mark.failure(24)
@PLANS
def test_tokens_at_the_context_limit_keep_exact_logprobs(policy, plan):
    """Stale drafts near the limit have corrupted state elsewhere."""
    requests = make_requests(prompts(4), Sampling(max_tokens=1000, ignore_eos=True))
    for rollout in run(policy, requests, plan).values():
        assert len(rollout.request.prompt_ids) + len(rollout.token_ids) == policy.max_length
        want = causal_logprobs(policy, rollout)
        torch.testing.assert_close(torch.tensor(rollout.policy_logprobs).double(), want, atol=1e-4, rtol=0)


@PLANS
def test_a_stop_string_ends_a_rollout_with_the_token_that_completes_it(policy, plan):
    decode = lambda ids: "".join(chr(ord("a") + token) for token in ids)  # noqa: E731
    free = run(policy, make_requests(prompts(20), Sampling(max_tokens=24)), plan)
    stop = next(decode(rollout.token_ids)[5:7] for rollout in free.values() if len(rollout.token_ids) > 8)
    stopped = run(
        policy, make_requests(prompts(20), Sampling(max_tokens=24, stop=(stop,))), plan, decode=decode
    )
    assert_same_rollouts(free, stopped, policy, cut=True)
    num_stopped = 0
    for rollout in stopped.values():
        text = decode(rollout.token_ids)
        if stop in text:
            assert text.index(stop) == len(text) - 2
            assert rollout.finish_reason == "stop"
            num_stopped += 1
    assert num_stopped


@PLANS
def test_non_finite_logits_fail_one_request_by_name_and_no_other(plan):
    poison = 23  # its embedding will be NaN, and no draw can reach it
    policy = random_policy()
    unreachable = torch.tensor([poison])
    policy.model.lm_head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, unreachable, -1e9))
    clean = [text for text in prompts(20) if poison not in text]
    healthy = run(policy, make_requests(clean, Sampling(max_tokens=12)), plan)
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[poison] = float("nan")
    requests = make_requests(clean, Sampling(max_tokens=12))
    (poisoned,) = make_requests([(5, poison, 6)], Sampling())
    requests.insert(3, dataclasses.replace(poisoned, request_id="poisoned"))
    rollouts = run(policy, requests, plan)
    failed = rollouts.pop("poisoned")
    assert failed.finish_reason == "error"
    assert failed.token_ids == ()
    assert failed.error is not None
    assert "NonFiniteLogits" in failed.error
    assert "'poisoned'" in failed.error
    assert_same_rollouts(healthy, rollouts, policy)


@pytest.mark.failure(29)
def test_a_weight_update_in_flight_recomputes_the_cache_and_stamps_new_tokens():
    policy = random_policy()
    requests = make_requests(prompts(6), Sampling(max_tokens=24, ignore_eos=True))
    engine = Engine(policy, plan=TWO_FORWARD)
    engine.submit(requests)
    for _ in range(3):
        engine.step()
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.05)
    engine.policy_version = 1
    engine.recompute_cache()
    finished = []
    while engine.num_requests:
        finished += engine.step().finished
    assert len(finished) == 6
    for rollout in finished:
        assert sorted(set(rollout.policy_versions)) == [0, 1] == sorted(set(rollout.policy_versions), key=int)
        fresh = rollout.policy_versions.index(1)
        assert set(rollout.policy_versions[fresh:]) == {1}
        want = causal_logprobs(policy, rollout)[fresh:]
        got = torch.tensor(rollout.policy_logprobs[fresh:]).double()
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
