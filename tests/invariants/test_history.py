"""Drafts from history through whole engines: what is drafted, from where, and whose the text stays."""

import dataclasses
import re
from collections import Counter

import pytest
import torch

from blockroll.errors import InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.policies.loading import TINY_POLICY_DIR, load_model, load_tokenizer
from blockroll.rollout.audit.check import check_audit
from blockroll.rollout.audit.writer import AuditWriter
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.drafters.history import HistoryDrafts
from blockroll.rollout.engine.engine import BareEngine
from blockroll.rollout.planning.candidates import candidate_plans
from blockroll.rollout.planning.planner import Planner
from blockroll.samplers.constraints import Regex
from blockroll.types import Plan, Request, Sampling
from tests.engines import PlansInTurn, causal_logprobs, make_requests, run
from tests.equality import assert_same_rollouts
from tests.models import VOCAB_SIZE, adapted_policy, prompts, random_model, random_policy

K = 6
PLAN = Plan(K, drafter="history")
GREEDY = Sampling(temperature=0, max_tokens=32, ignore_eos=True)


class Watch:
    """Keeps what each step drafted, by request: drafts and how many were accepted."""

    def __init__(self):
        self.steps = []

    def __call__(self, trace):
        draft, verdict = trace.draft, trace.verdict
        for row, request in enumerate(trace.requests):
            count = int(draft.num_drafts_B[row])
            self.steps.append(
                (request, draft.token_ids_BK[row, :count].tolist(), int(verdict.num_accepted_B[row]))
            )

    def drafts_of(self, request_id):
        return [drafts for request, drafts, _ in self.steps if request.request_id == request_id]


def drain(engine, requests):
    engine.submit(requests)
    finished = {}
    while engine.num_requests:
        finished |= {each.request.request_id: each for each in engine.step().finished}
    return finished


def request(name, prompt, *, seed, group=None, **options):
    return Request(
        request_id=name, prompt_ids=prompt, seed=seed, group_id=group, sampling=Sampling(**options)
    )


def accepted(rollouts):
    return sum(rollout.stats.num_accepted for rollout in rollouts.values())


def test_greedy_texts_of_fifty_prompts_are_those_of_plain_decoding():
    policy = random_policy(scale=3.0)
    requests = make_requests(prompts(50), GREEDY)
    drafted = run(policy, requests, PLAN, max_batch_size=8)
    assert_same_rollouts(run(policy, requests, Plan(0), max_batch_size=8), drafted, policy)
    assert accepted(drafted) > 100
    counts = Counter(rollout.stats.num_drafted for rollout in drafted.values())
    assert len(counts) > 5, "each request has its own number of drafts"


def test_every_request_of_a_group_has_the_policys_own_log_probabilities():
    policy = random_policy(scale=2.0)
    requests = [
        dataclasses.replace(each, group_id=f"g{index % 3}", prompt_ids=prompts(3)[index % 3])
        for index, each in enumerate(make_requests(prompts(12), Sampling(max_tokens=32, ignore_eos=True)))
    ]
    finished = run(policy, requests, PLAN, max_batch_size=5)
    assert accepted(finished) > 0
    for rollout in finished.values():
        got = torch.tensor(rollout.policy_logprobs).double()
        assert torch.allclose(got, causal_logprobs(policy, rollout), atol=1e-4)


def test_a_sibling_that_has_ended_is_drafted_from_its_first_token():
    policy = random_policy()
    engine = Engine(policy, plan=PLAN, observers=[watch := Watch()])
    prompt = (5, 9, 13)
    first = drain(engine, [request("a", prompt, seed=1, group="g", max_tokens=24, ignore_eos=True)])["a"]
    drain(engine, [request("b", prompt, seed=2, group="g", max_tokens=24, ignore_eos=True)])
    drafts = watch.drafts_of("b")[0]
    assert drafts
    assert drafts == [*first.token_ids[: len(drafts)]]


def test_a_sibling_that_runs_is_drafted_as_far_as_it_is_committed():
    policy = random_policy()
    engine = Engine(policy, plan=PLAN, observers=[watch := Watch()])
    prompt = (5, 9, 13)
    engine.submit([request("a", prompt, seed=1, group="g", max_tokens=40, ignore_eos=True)])
    for _ in range(4):
        engine.step()
    engine.submit([request("b", prompt, seed=2, group="g", max_tokens=40, ignore_eos=True)])
    engine.step()
    (committed,) = [each.token_ids for each in engine.abort(["a"])]
    drafts = watch.drafts_of("b")[0]
    assert drafts
    assert drafts == [*committed[: len(drafts)]]


@pytest.mark.parametrize("group", ["g", "later"])
def test_a_text_of_another_group_or_epoch_is_drafted_too(group):
    policy = random_policy()
    engine = Engine(policy, plan=PLAN, observers=[watch := Watch()])
    prompt = (7, 7, 11)
    first = drain(engine, [request("a", prompt, seed=1, group="g", **GREEDY_OPTIONS)])["a"]
    second = drain(engine, [request("b", prompt, seed=1, group=group, **GREEDY_OPTIONS)])["b"]
    assert second.token_ids == first.token_ids
    assert second.stats.num_forwards < first.stats.num_forwards
    assert watch.drafts_of("b")[0] == [*first.token_ids[: len(watch.drafts_of("b")[0])]]


GREEDY_OPTIONS = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}


def test_a_group_of_one_drafts_from_itself_and_from_the_job():
    policy = random_policy(scale=3.0)
    alone = drain(Engine(policy, plan=PLAN), [request("a", (5,), seed=1, group="g", **GREEDY_OPTIONS)])
    assert alone["a"].stats.num_drafted > 0
    engine = Engine(policy, plan=PLAN)
    drain(engine, [request("a", (5, 8), seed=1, **GREEDY_OPTIONS)])
    later = drain(engine, [request("b", (6, 5, 8), seed=1, **GREEDY_OPTIONS)])
    assert later["b"].stats.num_drafted > 0


def test_a_seed_that_serves_again_is_drafted_its_own_text_and_draws_it_once_more():
    policy = random_policy()
    engine = Engine(policy, plan=PLAN)
    options = {"max_tokens": 24, "ignore_eos": True}
    requests = [request("a", (5, 9), seed=1, **options), request("b", (5, 9), seed=2, **options)]
    once, again = drain(engine, requests), drain(engine, requests)
    assert_same_rollouts(once, again, policy)
    assert sum(each.stats.num_accepted for each in again.values()) > 30
    assert sum(each.stats.num_accepted for each in once.values()) < 30


def test_a_request_that_was_aborted_goes_on_with_drafts():
    policy = random_policy()
    engine = Engine(policy, plan=PLAN)
    options = {"max_tokens": 40, "ignore_eos": True}
    drain(engine, [request("s", (5, 9), seed=2, **options)])
    engine.submit([first := request("a", (5, 9), seed=1, **options)])
    for _ in range(3):
        engine.step()
    (aborted,) = engine.abort(["a"])
    resumed = drain(engine, [dataclasses.replace(first, prefix=aborted.as_prefix())])["a"]
    assert resumed.token_ids[: len(aborted.token_ids)] == aborted.token_ids
    assert resumed.stats.num_drafted > aborted.stats.num_drafted
    anew = drain(engine, [first])["a"]
    assert_same_rollouts([anew], [dataclasses.replace(resumed, request=anew.request)], policy)


def test_nothing_is_drafted_behind_a_token_that_ends_the_text_nor_past_its_length():
    policy = random_policy(scale=3.0)
    prompt = (5, 9, 13)
    history = HistoryDrafts(row_cost=0.001)
    engine = Engine(policy, plan=PLAN, observers=[watch := Watch()], drafters=[history])
    text = drain(engine, [request("a", prompt, seed=1, **GREEDY_OPTIONS)])["a"].token_ids
    stop = text[2]
    options = {**GREEDY_OPTIONS, "stop_token_ids": (stop,)}
    ended = drain(engine, [request("b", prompt, seed=1, **options)])["b"]
    assert ended.finish_reason == "stop"
    drafts = watch.drafts_of("b")
    assert [each for each in drafts if stop in each[:-1]] == []
    assert any(each and each[-1] == stop for each in drafts)
    short = drain(engine, [request("c", prompt, seed=1, **{**GREEDY_OPTIONS, "max_tokens": 4})])["c"]
    assert short.finish_reason == "length"
    assert [len(each) for each in watch.drafts_of("c")] == [3]


def test_drafts_that_an_option_forbids_are_only_rejected():
    policy = random_policy(scale=3.0)
    prompt = (5, 9, 13)
    engine = Engine(policy, plan=PLAN)
    text = drain(engine, [request("a", prompt, seed=1, **GREEDY_OPTIONS)])["a"].token_ids
    options = {**GREEDY_OPTIONS, "bad_words_ids": ((text[1],),)}
    drafted = drain(engine, [request("b", prompt, seed=1, **options)])
    plain = drain(Engine(policy, plan=Plan(0)), [request("b", prompt, seed=1, **options)])
    assert_same_rollouts(plain, drafted, policy)
    assert text[1] not in drafted["b"].token_ids
    assert drafted["b"].stats.num_drafted > drafted["b"].stats.num_accepted


def test_drafts_that_a_constraint_forbids_are_cut_and_the_text_matches():
    """A history of free text, which breaks the pattern at once or later."""
    policy = HFPolicy(load_model(TINY_POLICY_DIR, device="cpu"), load_tokenizer("tiny"))
    free = {**GREEDY_OPTIONS, "logit_bias": {6: 8.0, 7: 8.0, 8: 7.0}}
    pattern = re.escape(policy.tokenizer.decode([6])) + "{2}" + re.escape(policy.tokenizer.decode([7])) + "+"
    bound = {**free, "constraint": Regex(pattern), "ignore_eos": False}
    for temperature in (0, 1):
        engine = Engine(policy, plan=PLAN)
        drain(engine, [request(f"f{i}", (5, 9), seed=i, **{**free, "temperature": 1}) for i in range(8)])
        requests = [
            request(f"b{i}", (5, 9), seed=10 + i, **{**bound, "temperature": temperature}) for i in range(4)
        ]
        drafted = drain(engine, requests)
        assert sum(each.stats.num_drafted - each.stats.num_accepted for each in drafted.values()) > 0
        for each in drafted.values():
            assert each.error is None
            text = policy.tokenizer.decode(each.token_ids, skip_special_tokens=True)
            assert re.fullmatch(pattern, text) or (each.finish_reason == "length" and re.match(pattern, text))
        if temperature == 0:
            plain = drain(Engine(policy, plan=Plan(0)), requests)
            assert_same_rollouts(plain, drafted, policy)


def test_history_survives_a_change_of_weights():
    policy = random_policy()
    engine = Engine(policy, plan=PLAN)
    prompt = (5, 9, 13)
    drain(engine, [request("a", prompt, seed=1, **GREEDY_OPTIONS)])
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(1.01)
    engine.change_weights(1)
    engine.recompute_cache()
    after = drain(engine, [request("b", prompt, seed=1, **GREEDY_OPTIONS)])
    assert after["b"].stats.num_accepted > 10
    assert set(after["b"].policy_versions) == {1}


def test_steps_of_other_plans_are_read_and_learned_from():
    policy = adapted_policy()
    turns = PlansInTurn(PLAN, Plan(0), Plan(3), PLAN, Plan(3, (0, 3)))
    requests = [
        request(f"r{index}", (5, 9), seed=index, group="g", max_tokens=24, ignore_eos=True)
        for index in range(4)
    ]
    drafter = HistoryDrafts()
    finished = run(policy, requests, turns, drafters=[drafter])
    kept = [[*text] for texts in drafter.index.prompts for text in texts.ended]
    assert sorted(kept) == sorted([*rollout.token_ids] for rollout in finished.values())


def test_an_engine_that_no_plan_asks_for_history_learns_nothing():
    drafter = HistoryDrafts()
    run(random_policy(), make_requests(prompts(3), GREEDY), Plan(0), drafters=[drafter])
    assert drafter.index.num_tokens == 0


def test_a_step_that_raised_runs_again_with_the_same_drafts():
    policy = random_policy()
    requests = [request(f"r{i}", (5, 9), seed=i, group="g", max_tokens=24, ignore_eos=True) for i in range(4)]
    undisturbed = run(policy, requests, PLAN)
    engine = Engine(policy, plan=PLAN)
    engine.submit(requests)
    verify, finished, calls = policy.verify_logits, {}, 0

    def breaks_at_times(*arguments):
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise RuntimeError("broken")
        return verify(*arguments)

    policy.verify_logits = breaks_at_times
    while engine.num_requests:
        try:
            finished |= {each.request.request_id: each for each in engine.step().finished}
        except RuntimeError:
            engine.check_integrity()
    del policy.verify_logits
    assert_same_rollouts(undisturbed, finished, policy, at_most=0)


def test_an_audit_of_drafts_from_history_passes_at_both_levels(tmp_path):
    policy = random_policy()
    requests = [request(f"r{i}", (5, 9), seed=i, group="g", max_tokens=24, ignore_eos=True) for i in range(6)]
    run(policy, requests, PLAN, observers=[AuditWriter(tmp_path)], max_batch_size=2)
    report = check_audit(sorted(tmp_path.glob("*.parquet")), policy_of=lambda version: policy)
    assert report.problem is None
    assert report.num_rows == 6 * 24


@pytest.mark.parametrize("max_tokens", [0, -1, 2.5])
def test_a_bound_that_keeps_nothing_is_refused_by_name(max_tokens):
    with pytest.raises(InvalidInput, match=f"max_tokens of a history .* at least 1, got {max_tokens}"):
        HistoryDrafts(max_tokens=max_tokens)


@pytest.mark.parametrize("row_cost", [0, -0.5, 1.5, float("nan")])
def test_a_row_cost_that_is_no_chance_is_refused(row_cost):
    with pytest.raises(InvalidInput, match="row_cost of a history must be above 0 and at most 1"):
        HistoryDrafts(row_cost=row_cost)


def test_a_history_of_one_token_serves_as_well():
    policy = random_policy(scale=3.0)
    requests = make_requests(prompts(6), GREEDY)
    small = HistoryDrafts(max_tokens=1)
    drafted = run(policy, requests, PLAN, drafters=[small], max_batch_size=2)
    assert_same_rollouts(run(policy, requests, Plan(0), max_batch_size=2), drafted, policy)
    assert small.index.num_tokens <= 1


def test_more_drafts_than_the_context_holds_are_refused():
    with pytest.raises(InvalidInput, match="drafts 200 tokens, but the policy's context holds 96"):
        Engine(random_policy(), plan=Plan(200, drafter="history"))


def test_an_engine_takes_a_given_history_instead_of_its_own_and_no_two():
    policy = random_policy()
    given = HistoryDrafts(max_tokens=1000)
    run(policy, make_requests(prompts(3), GREEDY), PLAN, drafters=[given])
    assert given.index.num_tokens > 3 * 32
    with pytest.raises(InvalidInput, match="two drafters are called 'history'"):
        Engine(policy, plan=PLAN, drafters=[HistoryDrafts(), HistoryDrafts()])
    with pytest.raises(InvalidInput, match="asks for the drafter 'history', and this engine has none"):
        BareEngine(policy, plan=PLAN)


def test_prompts_that_repeat_one_token_thousands_of_times_are_served():
    model = random_model(scale=3.0)
    model.config.max_position_embeddings = 2100
    policy = HFPolicy(model)
    requests = [request(f"r{i}", (7,) * 2000, seed=i, group="g", **GREEDY_OPTIONS) for i in range(3)]
    drafted = run(policy, requests, PLAN)
    assert_same_rollouts(run(policy, requests, Plan(0)), drafted, policy)
    assert accepted(drafted) > 0


def test_prompts_that_repeat_one_token_are_served():
    policy = random_policy(scale=3.0)
    requests = [request(f"r{i}", (7,) * 60, seed=i, group="g", **GREEDY_OPTIONS) for i in range(3)]
    drafted = run(policy, requests, PLAN)
    assert_same_rollouts(run(policy, requests, Plan(0)), drafted, policy)
    assert all(0 <= token < VOCAB_SIZE for rollout in drafted.values() for token in rollout.token_ids)


def test_auto_drafts_from_history_and_changes_no_text_of_a_policy_without_drafts():
    """Epochs of groups, and a prompt that repeats one token, by a clock that counts forwards alone."""
    policy = random_policy(scale=3.0)
    num_forwards = 0

    def count(*given):
        nonlocal num_forwards
        num_forwards += 1

    policy.output_head.register_forward_pre_hook(count)
    planner = Planner(candidate_plans(policy, with_mask_rows=False))
    engine = Engine(policy, plan=planner, max_batch_size=4, clock=lambda: 1e-3 * num_forwards)
    texts = [(7,) * 60, *prompts(3)]
    drafted, plain = {}, {}
    for epoch in range(8):
        asked = [
            request(
                f"{epoch}-{index}",
                texts[index % 4],
                seed=100 * epoch + index,
                group=f"{index % 4}",
                max_tokens=24,
            )
            for index in range(12)
        ]
        drafted |= drain(engine, asked)
        plain |= run(policy, asked, Plan(0), max_batch_size=4)
    assert_same_rollouts(plain, drafted, policy)
    assert accepted(drafted) > 5
    names = {plan.name for each in drafted.values() for plan, _ in each.stats.steps_by_plan}
    assert len(names) > 2
    assert "plain" in names
