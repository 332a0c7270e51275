"""Histories that several replicas share, and siblings one by one: drafts change, texts never do."""

import dataclasses
import itertools
import os
import signal

import pytest

from blockroll import RolloutPool
from blockroll.config import PolicyConfig, RolloutConfig
from blockroll.errors import ConfigError, InvalidInput, ReplicaError
from blockroll.policies.hf import HFPolicy
from blockroll.policies.loading import load_tokenizer
from blockroll.rl_loops import arithmetic
from blockroll.rollout.pool.makers import make_pool, pool_from_options
from blockroll.types import Plan, Sampling
from tests.engines import make_requests, run
from tests.equality import assert_same_rollouts
from tests.models import prompts, random_model

SAMPLED = Sampling(max_tokens=24, ignore_eos=True)
GREEDY = dataclasses.replace(SAMPLED, temperature=0)
CONFIG = RolloutConfig(
    num_replicas=2, threads_per_replica=1, max_batch_size=8, plan="history(8)", backend="local"
)
BACKENDS = ["local", pytest.param("ray", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    random_model(scale=3.0).save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "ray":
        pytest.importorskip("ray")
        request.getfixturevalue("ray_session")
    return request.param


def made(checkpoint, **options):
    return make_pool(PolicyConfig(path=checkpoint), dataclasses.replace(CONFIG, **options))


def groups(sampling, num_prompts, size, *, name="g", seed=1):
    """Groups of `size`, one behind the other; greedy siblings write the same text."""
    each = make_requests(
        [prompt for prompt in prompts(num_prompts) for _ in range(size)], sampling, seed=seed
    )
    return [
        dataclasses.replace(request, request_id=f"{name}-{index}", group_id=f"{name}-{index // size}")
        for index, request in enumerate(each)
    ]


def accepted(rollouts):
    return sum(rollout.stats.num_accepted for rollout in rollouts)


def kill(pool, index):
    """The replica dies: its process, or what stands for one in this process."""
    replica = pool._members[index].replica
    if pool._on_close is not None:
        os.kill(pool.health()[index].pid, signal.SIGKILL)
        return

    def dead():
        raise ReplicaError(f"replica {index} died")

    replica.poll = dead


def texts_of(replica):
    """By prompt, what its history holds; each list in no order."""
    prompts_of = replica.engine._drafters["history"].index.prompts
    return {tuple(texts.prompt): sorted(map(tuple, texts.ended)) for texts in prompts_of}


def test_replicas_draft_from_what_others_have_finished_and_draw_the_same_tokens(checkpoint, backend):
    """Requests without a group go to the replica with the least to do, one to each."""
    policy = HFPolicy.from_pretrained(checkpoint)
    calls = [groups(GREEDY, 1, 1, name="first"), groups(GREEDY, 1, 2, name="second")]
    calls[1] = [dataclasses.replace(each, group_id=None) for each in calls[1]]
    counts = {}
    for shares in (False, True):
        with made(checkpoint, backend=backend, share_history=shares) as pool:
            rollouts = [list(pool.generate(requests)) for requests in calls]
            counts[shares] = accepted(rollouts[1])
            assert pool.num_shared_texts == (3 if shares else 0)
        for requests, drawn in zip(calls, rollouts, strict=True):
            assert_same_rollouts(run(policy, requests, Plan(0)), drawn, policy)
    assert counts[True] > counts[False]


@pytest.mark.parametrize("shares", [False, True])
def test_a_killed_replica_changes_no_token_whether_histories_are_shared_or_not(checkpoint, backend, shares):
    policy = HFPolicy.from_pretrained(checkpoint)
    requests = groups(SAMPLED, 12, 4)
    want = run(policy, requests, Plan(0), max_batch_size=8)
    with made(checkpoint, backend=backend, share_history=shares) as pool:
        drawn = []
        for rollout in pool.generate(requests):
            drawn.append(rollout)
            if len(drawn) == 5:
                kill(pool, 1)
        assert pool.states == ("READY", "DEAD")
        assert pool.num_redispatched > 0
        assert (pool.num_shared_texts > 0) == shares
    assert accepted(drawn) > 0
    assert_same_rollouts(want, drawn, policy)


def test_what_a_killed_replica_had_finished_lives_on_in_the_histories_of_the_others(checkpoint):
    requests = groups(SAMPLED, 6, 2)
    for shares in (False, True):
        with made(checkpoint, share_history=shares) as pool:
            drawn = list(pool.generate(requests))
            known = [texts_of(member.replica) for member in pool._members]
            kill(pool, 1)
            pool._members[1].state = "DEAD"
            written = {prompt: [] for prompt in prompts(6)}
            for rollout in drawn:
                written[rollout.request.prompt_ids].append(rollout.token_ids)
            everything = {prompt: sorted(texts) for prompt, texts in written.items()}
            if shares:
                assert known == [everything, everything]
            else:
                assert not known[0].keys() & known[1].keys()
            before = pool.num_shared_texts
            list(pool.generate(groups(SAMPLED, 6, 2, name="later", seed=2)))
            assert pool.num_shared_texts == before, "nothing is told to the dead"


def test_a_rollout_that_was_aborted_or_failed_is_not_shared(checkpoint):
    with made(checkpoint, share_history=True) as pool:
        iterator = pool.generate(groups(SAMPLED, 4, 2))
        next(iterator)
        aborted = [each for each in iterator.close() if each.finish_reason == "abort"]
        assert aborted
        assert pool.num_shared_texts == 8 - len(aborted)


def test_sharing_that_has_no_effect_is_refused_by_name():
    with pytest.raises(ConfigError, match="share_history=True shares nothing where history_tokens is 0"):
        RolloutConfig(share_history=True, history_tokens=0)
    with pytest.raises(InvalidInput, match="share_history has an effect only with num_replicas above 1"):
        pool_from_options("tiny", {"share_history": True})
    with pytest.raises(ConfigError, match="group_order"):
        RolloutConfig(group_order="siblings")


@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_siblings_one_by_one_draw_the_same_tokens_and_accept_more_where_they_repeat(
    checkpoint, backend, sampling
):
    policy = HFPolicy.from_pretrained(checkpoint)
    requests = groups(sampling, 16, 4)
    want = run(policy, requests, Plan(0), max_batch_size=8)
    counts = {}
    for order in ("together", "sibling_by_sibling"):
        with made(checkpoint, backend=backend, num_replicas=1, max_batch_size=4, group_order=order) as pool:
            drawn = list(pool.generate(requests))
            counts[order] = accepted(drawn)
            assert_same_rollouts(want, drawn, policy)
    if sampling is GREEDY:
        assert counts["sibling_by_sibling"] > 1.2 * counts["together"]


def test_a_call_that_is_closed_gives_back_what_was_asked_in_the_asked_order(checkpoint):
    requests = groups(SAMPLED, 6, 3)
    with made(checkpoint, group_order="sibling_by_sibling", share_history=True) as pool:
        left = pool.generate(requests).close()
    assert [each.request.request_id for each in left] == [each.request_id for each in requests]


def num_forwards(rollouts):
    """Request-forwards of rollouts that all have the same number of tokens."""
    assert {len(each.token_ids) for each in rollouts} == {SAMPLED.max_tokens}
    return sum(each.stats.num_forwards for each in rollouts)


PROBLEMS = [each.prompt for each in itertools.islice(arithmetic.problems(0, held_out=False), 16)]


def test_sampled_siblings_one_by_one_save_forwards_in_the_first_epoch_of_their_prompts():
    counts = {}
    for order in ("together", "sibling_by_sibling"):
        with RolloutPool.from_pretrained(
            "tiny", plan="history(8)", max_batch_size=8, group_order=order
        ) as pool:
            asked = pool.requests(PROBLEMS, SAMPLED, num_samples=6)
            counts[order] = num_forwards([*pool.generate(asked)])
    assert counts["sibling_by_sibling"] < 0.75 * counts["together"]


def test_a_prompt_that_comes_to_another_replica_is_drafted_its_earlier_texts_where_they_are_shared():
    counts = {}
    for shares in (False, True):
        with RolloutPool.from_pretrained(
            "tiny", plan="history(8)", num_replicas=2, max_batch_size=8, share_history=shares
        ) as pool:
            list(pool.generate(pool.requests(PROBLEMS, SAMPLED, num_samples=2)))
            moved = PROBLEMS[::-1]  # replicas take groups in turns, and these are even: each meets the other
            counts[shares] = num_forwards(
                [*pool.generate(pool.requests(moved, SAMPLED, seed=1, num_samples=2))]
            )
    assert counts[True] < 0.5 * counts[False]
