"""Prompts written chunk by chunk, beside what runs: the same tokens, and nobody waits for long."""

import dataclasses
import random

import pytest
import torch

from blockroll.errors import InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.cache.slots import SlotCache
from blockroll.rollout.engine.served import ServedRequests
from blockroll.types import Plan, Request, Sampling
from tests.engines import PlansInTurn, make_requests, run
from tests.equality import assert_same_rollouts
from tests.invariants.test_prefixes import assert_cache_is_cold, text
from tests.models import adapted_policy
from tests.numerics.test_positions import model as longrope_model

IN_BOTH = pytest.mark.usefixtures("layout")
PLANS = pytest.mark.parametrize(
    "plan", [Plan(0), Plan(4), Plan(4, (0, 2, 4))], ids=["plain", "two_forward", "fused"]
)
SAMPLING = Sampling(max_tokens=12, ignore_eos=True)
CHUNKED = {"prefill_chunk": 16, "max_prefill_rows": 24}
PROMPTS = [
    *[text(30, seed=1)] * 3,
    text(70, seed=2),
    text(1, seed=3),
    (*text(70, seed=2)[:50], 5, 6),
    text(60, seed=4),
    text(2, seed=5),
    text(70, seed=2),
]


@pytest.fixture
def policy():
    return adapted_policy()


class Forwards:
    """Rows of each forward of a policy's prefill, and forwards of any other kind as 0."""

    def __init__(self, policy, monkeypatch):
        self.rows = []
        for name in ("prefill", "draft_logits", "verify_logits", "fused_rows"):
            monkeypatch.setattr(policy, name, self.counting(name, getattr(policy, name)))

    def counting(self, name, real):
        def forward(ids, *arguments, **options):
            self.rows.append(ids.numel() if name == "prefill" else 0)
            return real(ids, *arguments, **options)

        return forward

    def taken(self):
        rows, self.rows = [each for each in self.rows if each], []
        return rows


def named(requests, name):
    return [dataclasses.replace(each, request_id=f"{name} {each.request_id}") for each in requests]


def finish(engine):
    finished = {}
    while engine.num_requests:
        finished |= {rollout.request.request_id: rollout for rollout in engine.step().finished}
        engine.check_integrity()
    return finished


@IN_BOTH
@PLANS
def test_prompts_in_chunks_draw_what_they_draw_in_one_forward(policy, plan, monkeypatch):
    requests = make_requests(PROMPTS, SAMPLING)
    whole = run(policy, requests, plan)
    forwards = Forwards(policy, monkeypatch)
    for chunks in ({"prefill_chunk": 5, "max_prefill_rows": 7}, {**CHUNKED, "max_batch_size": 3}):
        chunked = run(policy, requests, plan, **chunks)
        rows = forwards.taken()
        assert max(rows) <= chunks["max_prefill_rows"]
        assert_same_rollouts(whole, chunked, policy)
        for rollout in chunked.values():
            stats = rollout.stats
            assert stats.num_prefilled + stats.num_reused == len(rollout.request.prompt_ids) - 1


@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe"])
def test_windows_and_experts_see_no_chunks(family):
    policy, requests = adapted_policy(family), make_requests(PROMPTS, SAMPLING)
    whole = run(policy, requests, Plan(4))
    assert_same_rollouts(whole, run(policy, requests, Plan(4), **CHUNKED), policy)


def test_the_first_chunk_of_a_text_has_the_factors_of_its_whole_length():
    """Longrope takes others for texts above 24 tokens, of which a first chunk has fewer."""
    policy = HFPolicy(longrope_model())
    requests = make_requests([text(60, seed=1), text(20, seed=2), text(26, seed=3)], SAMPLING)
    whole = run(policy, requests, Plan(0))
    assert_same_rollouts(whole, run(policy, requests, Plan(0), max_prefill_rows=16), policy)


def test_planted_factors_of_a_chunk_s_own_length_are_noticed(monkeypatch):
    policy = HFPolicy(longrope_model())
    prefill = policy.prefill
    requests = make_requests([text(60, seed=1)], SAMPLING)
    whole = run(policy, requests, Plan(0))
    monkeypatch.setattr(policy, "prefill", lambda ids, window, **_: prefill(ids, window))
    with pytest.raises(AssertionError):
        assert_same_rollouts(whole, run(policy, requests, Plan(0), max_prefill_rows=16), policy, at_most=0)


@IN_BOTH
def test_between_two_tokens_of_a_request_there_is_one_chunk_of_a_long_prompt(monkeypatch):
    """4,096 tokens, twice, join one that runs; short ones that come then wait for two chunks at most."""
    policy = adapted_policy(max_position_embeddings=4200)
    forwards = Forwards(policy, monkeypatch)
    engine = Engine(policy, plan=Plan(0), prefill_chunk=512)
    ids = {"long": text(4096, seed=1), "twin": text(4096, seed=1), "short": text(40, seed=2)}
    ids |= {"other": text(9, seed=3), "first": text(30, seed=4)}
    requests = {
        name: Request(request_id=name, prompt_ids=ids[name], seed=1, sampling=SAMPLING) for name in ids
    }
    endless = dataclasses.replace(SAMPLING, max_tokens=40)
    engine.submit([dataclasses.replace(requests["first"], sampling=endless)])
    engine.step()
    began, arrived = {}, {"long": 1, "twin": 1, "short": 4, "other": 5}
    forwards.taken()
    for number in range(1, 30):
        engine.submit([requests[name] for name, step in arrived.items() if step == number])
        commits = {commit.request_id: commit for commit in engine.step().commits}
        assert "first" in commits, "a request that runs was not decoded"
        rows = forwards.taken()
        assert len(rows) <= 1
        assert sum(rows) <= 512
        for name in commits.keys() - began.keys():
            began[name] = number
        engine.check_integrity()
    assert began["long"] == began["twin"] <= 2 * 4095 // 512
    assert began["short"] <= arrived["short"] + 1
    assert began["other"] <= arrived["other"] + 1
    finish(engine)


def test_where_nothing_runs_chunks_follow_one_another(policy, monkeypatch):
    forwards = Forwards(policy, monkeypatch)
    engine = Engine(policy, plan=Plan(0), max_prefill_rows=24)
    engine.submit(make_requests([text(70, seed=1)] * 4, SAMPLING))
    for rows in (24, 24):
        assert not engine.step().commits
        assert forwards.rows.pop() == rows
    assert len(engine.step().commits) == 4
    assert forwards.rows == [0]  # the last rows come with those of the first step


@IN_BOTH
def test_running_texts_are_written_anew_in_forwards_as_small(policy, monkeypatch):
    requests = make_requests(PROMPTS, dataclasses.replace(SAMPLING, max_tokens=24))
    want = run(policy, requests, Plan(0))
    engine = Engine(policy, plan=Plan(0), **CHUNKED)
    engine.submit(requests)
    while len(engine._scheduler.running) < len(requests):
        engine.step()
    forwards = Forwards(policy, monkeypatch)
    engine.recompute_cache()
    rows = forwards.taken()
    assert sum(rows) > 200
    assert max(rows) <= 24
    engine.check_integrity()
    monkeypatch.undo()
    assert_same_rollouts(want, finish(engine), policy)


@IN_BOTH
def test_a_forward_that_raises_in_the_midst_of_a_prompt_costs_one_chunk(policy, monkeypatch):
    forwards = Forwards(policy, monkeypatch)
    engine = Engine(policy, plan=Plan(0), max_prefill_rows=16)
    requests = make_requests([text(80, seed=1), text(80, seed=2)], SAMPLING)
    engine.submit(requests)
    for _ in range(3):
        engine.step()
    layer = policy.model.base_model.layers[-1]
    hook = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    engine.check_integrity()
    hook.remove()
    finished = finish(engine)
    assert sum(forwards.taken()) <= 2 * 79 + 16
    monkeypatch.undo()
    assert_same_rollouts(run(policy, requests, Plan(0)), finished, policy)


@IN_BOTH
def test_an_abort_in_the_midst_of_a_prompt_leaves_its_rows_to_the_next(policy):
    engine = Engine(policy, plan=Plan(0), **CHUNKED)
    running, long, twin = (
        named(make_requests([text(length, seed=length)], SAMPLING), name)[0]
        for name, length in (("running", 9), ("long", 80), ("twin", 80))
    )
    engine.submit([running])
    engine.step()
    engine.submit([long])
    engine.step()
    engine.step()
    (aborted,) = engine.abort([long.request_id])
    assert (aborted.finish_reason, aborted.token_ids, aborted.stats.num_prefilled) == ("abort", (), 32)
    engine.check_integrity()
    engine.submit([twin])
    finished = finish(engine)
    assert finished[twin.request_id].stats.num_reused == 32
    assert_same_rollouts(run(policy, [running, twin], Plan(0)), finished, policy)


@IN_BOTH
def test_no_row_of_weights_that_change_in_the_midst_of_a_prompt_is_read():
    policy = adapted_policy()
    requests = make_requests([text(80, seed=1), text(70, seed=2), text(3, seed=3)], SAMPLING)
    engine = Engine(policy, plan=Plan(4), **CHUNKED)
    engine.submit(requests[:2])
    engine.step()
    engine.step()
    assert engine._scheduler.joining
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.1)
    engine.change_weights(1)
    engine.check_integrity()
    engine.recompute_cache()
    engine.submit(requests[2:])
    finished = finish(engine)
    assert_same_rollouts(run(policy, requests, Plan(4), policy_version=1), finished, policy)


def poisoned(policy):
    """A policy whose token 23 is NaN, and prompts with and without it."""
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[23] = float("nan")
    clean = tuple(each if each != 23 else 5 for each in text(80, seed=1))
    return clean, (*clean[:20], 23, *clean[21:])


SAFE = dataclasses.replace(SAMPLING, bad_words_ids=((23,),))


@IN_BOTH
def test_nan_in_the_midst_of_a_prompt_fails_that_request_alone(policy):
    clean, bad = poisoned(policy)
    requests = named(make_requests([clean[:9], bad, clean], SAFE), "r")
    want = run(policy, [requests[0], requests[2]], Plan(0))
    engine = Engine(policy, plan=Plan(0), **CHUNKED)
    engine.submit(requests[:1])
    engine.step()
    engine.submit(requests[1:])
    finished = finish(engine)
    failed = finished.pop(requests[1].request_id)
    assert failed.finish_reason == "error"
    assert "NonFiniteLogits" in failed.error
    assert_same_rollouts(want, finished, policy)


def abort_a_poisoned_prompt(policy):
    """While it is written; the next request has its memory."""
    clean, bad = poisoned(policy)
    engine = Engine(policy, plan=Plan(0), **CHUNKED)
    short, long, other = named(make_requests([clean[:9], bad, clean[30:40]], SAFE), "r")
    engine.submit([short])
    engine.step()
    engine.submit([long])
    for _ in range(3):
        engine.step()
    engine.abort([long.request_id])
    engine.submit([other])
    assert {rollout.finish_reason for rollout in finish(engine).values()} == {"length"}


@IN_BOTH
def test_a_poisoned_prompt_that_is_aborted_poisons_no_other(policy):
    abort_a_poisoned_prompt(policy)


def test_planted_rows_that_nobody_has_looked_at_poison_the_next_request(policy, monkeypatch):
    monkeypatch.setattr(ServedRequests, "_clean", lambda self, slot: None)
    with pytest.raises(AssertionError):
        abort_a_poisoned_prompt(policy)


@IN_BOTH
@PLANS
def test_whatever_comes_goes_and_breaks_off_held_rows_equal_a_cold_prefill(policy, plan):
    rng = random.Random(0)
    engine = Engine(policy, plan=plan, max_batch_size=5, max_prefill_rows=18, prefill_chunk=9)
    known, num_ended = [text(40, seed=seed) for seed in range(2)], 0
    for turn in range(20):
        parent = rng.choice(known[-6:])
        prompt = (*parent[: rng.randrange(len(parent) + 1)], *text(1 + rng.randrange(20), seed=turn))[:75]
        sampling = Sampling(max_tokens=rng.randrange(1, 12), ignore_eos=True)
        requests = make_requests([prompt] * rng.choice([1, 1, 3]), sampling, seed=turn)
        engine.submit(named(requests, f"{turn}"))
        if turn % 5 == 4:
            engine.abort([rng.choice((*engine._scheduler.joining, *engine._scheduler.running, "none"))])
        if turn % 9 == 8:
            hook = policy.model.base_model.layers[-1].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.step()
            hook.remove()
        for rollout in engine.step().finished:
            known.append((*rollout.request.prompt_ids, *rollout.token_ids))
            num_ended += 1
        engine.check_integrity()
        if turn % 4 == 0:
            assert_cache_is_cold(policy, engine)
    assert num_ended > 5


@IN_BOTH
def test_all_may_end_in_one_step_beside_a_prompt_that_is_written(policy):
    requests = make_requests([text(length, seed=length) for length in (1, 3, 1, 9, 80)], SAMPLING)
    requests[:4] = [dataclasses.replace(each, sampling=Sampling(max_tokens=1)) for each in requests[:4]]
    want = run(policy, requests, Plan(4))
    engine = Engine(policy, plan=Plan(4), **CHUNKED)
    engine.submit(requests)
    first = engine.step()
    assert len(first.finished) == 4
    engine.check_integrity()
    assert_same_rollouts(want, [*first.finished, *finish(engine).values()], policy)


def test_planted_a_hole_that_a_joining_text_fills_is_noticed(policy, monkeypatch):
    monkeypatch.setattr(SlotCache, "exchange", lambda self, first, second: None)
    engine = Engine(policy, plan=Plan(0), **CHUNKED)
    engine.submit(make_requests([text(9, seed=1), text(9, seed=2), text(80, seed=3)], SAMPLING))
    engine.step()
    engine.abort(["r0"])
    with pytest.raises(AssertionError, match="does not hold the text"):
        engine.check_integrity()


def test_higher_priorities_join_first_and_draw_the_same(policy):
    requests = make_requests([text(20, seed=seed) for seed in range(6)], SAMPLING)
    ranked = [dataclasses.replace(each, priority=int(i in (4, 5))) for i, each in enumerate(requests)]
    engine = Engine(policy, plan=Plan(0), max_batch_size=2)
    engine.submit(ranked)
    assert {commit.request_id for commit in engine.step().commits} == {"r4", "r5"}
    finished = finish(engine)
    assert [{*list(finished)[start : start + 2]} for start in (2, 4)] == [{"r0", "r1"}, {"r2", "r3"}]
    plain = [dataclasses.replace(each, request=requests[int(name[1:])]) for name, each in finished.items()]
    assert_same_rollouts(run(policy, requests, Plan(0)), plain, policy)


@pytest.mark.parametrize("priority", [1.5, "high", True])
def test_a_priority_that_is_no_whole_number_is_refused_by_name(policy, priority):
    request = dataclasses.replace(make_requests([(4, 5)], SAMPLING)[0], priority=priority)
    with pytest.raises(InvalidInput, match="'r0' has priority"):
        Engine(policy, plan=Plan(0)).submit([request])


def test_a_step_in_which_a_part_of_a_prompt_is_computed_is_no_measurement(policy):
    planner = PlansInTurn(Plan(0))
    engine = Engine(policy, plan=planner, **CHUNKED)
    first, long = make_requests([text(9, seed=1), text(80, seed=2)], SAMPLING)
    engine.submit([first])
    engine.step()
    engine.step()
    num_told = len(planner.observed)
    assert num_told > 0
    engine.submit([long])
    for _ in range(4):
        engine.step()
    assert len(planner.observed) == num_told
    finish(engine)
    assert len(planner.observed) > num_told
