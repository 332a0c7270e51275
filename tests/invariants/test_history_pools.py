"""Plans of history through pools, in this process and in Ray's actors, and across weight updates."""

import dataclasses

import pytest

from blockroll.config import PolicyConfig, RolloutConfig
from blockroll.errors import CheckpointError, ConfigError
from blockroll.policies.hf import HFPolicy
from blockroll.policies.loading import load_tokenizer
from blockroll.rollout.planning.candidates import candidate_plans
from blockroll.rollout.pool.makers import make_pool
from blockroll.rollout.pool.pool import RolloutPool
from blockroll.rollout.pool.weight_sync import make_update, named_weights
from blockroll.types import Plan, Sampling
from tests.engines import make_requests, run
from tests.equality import assert_same_rollouts
from tests.models import prompts, random_model

GREEDY = Sampling(temperature=0, max_tokens=24, ignore_eos=True)
CONFIG = RolloutConfig(num_replicas=2, threads_per_replica=1, max_batch_size=8, plan="history(8)")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """One that was never taught to draft."""
    folder = tmp_path_factory.mktemp("policy")
    model = random_model(scale=3.0)
    del model.config.blockroll
    model.save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.slow)])
def pool(request, checkpoint):
    if request.param == "ray":
        pytest.importorskip("ray")
        request.getfixturevalue("ray_session")
    with make_pool(PolicyConfig(path=checkpoint), dataclasses.replace(CONFIG, backend=request.param)) as made:
        yield made


def groups(seed, epoch):
    """Four samples of each prompt, greedy, so that texts can be compared."""
    return [
        dataclasses.replace(each, request_id=f"{epoch}-{index}", group_id=f"{epoch}-{index % 6}")
        for index, each in enumerate(make_requests(prompts(6) * 4, GREEDY, seed=seed))
    ]


def test_a_pool_serves_plans_of_history_and_its_texts_stay_the_policys(pool, checkpoint):
    policy = HFPolicy.from_pretrained(checkpoint)
    forwards = []
    for epoch in (1, 2):
        requests = groups(epoch, epoch)
        drafted = {each.request.request_id: each for each in pool.generate(requests)}
        assert_same_rollouts(run(policy, requests, Plan(0), max_batch_size=8), drafted, policy)
        assert {plan.name for each in drafted.values() for plan, _ in each.stats.steps_by_plan} == {
            "history(8)"
        }
        forwards.append(sum(each.stats.num_forwards for each in drafted.values()))
    assert forwards[1] < forwards[0] < 24 * 24, "the second epoch drafts from the first"


def test_what_a_replica_remembers_outlives_a_weight_update(pool):
    before = [*pool.generate(groups(1, 1))]
    tensors = named_weights(random_model(scale=3.0))
    pool.update(make_update(tensors, version=1, base_version=0, bucket_bytes=4096))
    after = [*pool.generate(groups(2, 2))]
    assert {version for each in after for version in each.policy_versions} == {1}
    assert sum(each.stats.num_forwards for each in after) < sum(each.stats.num_forwards for each in before)


def test_history_is_a_candidate_of_auto(checkpoint):
    plans = candidate_plans(HFPolicy.from_pretrained(checkpoint))
    assert [plan.num_drafts for plan in plans if plan.drafter == "history"] == [1, 2, 4, 8, 16]


def test_a_pool_writes_what_it_remembers_and_another_goes_on_with_it(pool, checkpoint, tmp_path):
    list(pool.generate(groups(1, 1)))
    pool.save_history(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "history_0.safetensors",
        "history_1.safetensors",
    ]
    forwards = []
    for folder in (tmp_path, tmp_path / "nothing"):
        config = dataclasses.replace(CONFIG, backend="local", num_replicas=1)
        with make_pool(PolicyConfig(path=checkpoint), config) as other:
            other.load_history(folder)
            again = list(other.generate(groups(2, 2)))
        forwards.append(sum(each.stats.num_forwards for each in again))
    assert forwards[0] < 0.9 * forwards[1]


def test_each_replica_takes_the_file_of_its_number_and_several_take_one_where_there_is_none(
    checkpoint, tmp_path
):
    config = dataclasses.replace(CONFIG, backend="local", num_replicas=1)
    written = {}
    with make_pool(PolicyConfig(path=checkpoint), config) as pool:
        for number in (0, 1, 2, 10):
            list(pool.generate(groups(number, number)))
            written[number] = num_texts(pool, 0)
            pool.save_history(tmp_path, first=number)
    assert len(set(written.values())) == 4, "each file holds more than the one before"
    (tmp_path / "history_x.safetensors").write_bytes(b"none of a pool's")
    config = dataclasses.replace(config, num_replicas=3)
    with make_pool(PolicyConfig(path=checkpoint), config) as pool:
        for first, numbers in ((0, (0, 1, 2)), (3, (10, 0, 1)), (8, (0, 1, 10))):
            pool.load_history(tmp_path, first=first)
            assert [num_texts(pool, index) for index in range(3)] == [written[each] for each in numbers]


def test_replicas_that_were_joined_are_saved_by_the_process_that_made_them(pool, tmp_path):
    list(pool.generate(groups(1, 1)))
    joined = RolloutPool([member.replica for member in pool._members], is_joined=True)
    joined.save_history(tmp_path)
    assert not list(tmp_path.iterdir())
    pool.save_history(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(b"poison")
    joined.load_history(tmp_path)


def num_texts(pool, index):
    history = pool._members[index].replica.engine._drafters["history"].index
    return sum(1 for texts in history.prompts for _ in texts.ended)


def test_a_history_that_was_damaged_is_refused_by_name(pool, tmp_path):
    list(pool.generate(groups(1, 1)))
    pool.save_history(tmp_path)
    (tmp_path / "history_1.safetensors").write_bytes(b"poison")
    with pytest.raises(CheckpointError, match=r"history_1.safetensors is no history that can be read"):
        pool.load_history(tmp_path)


def test_a_bound_of_0_is_no_history(checkpoint):
    with pytest.raises(ConfigError, match=r"plan history\(8\) looks drafts up .* history_tokens is 0"):
        RolloutConfig(plan="history(8)", history_tokens=0)
    config = RolloutConfig(plan="auto", backend="local", num_replicas=1, history_tokens=0)
    with make_pool(PolicyConfig(path=checkpoint), config) as plain:
        rollouts = list(plain.generate(groups(1, 1)))
    assert {plan.name for each in rollouts for plan, _ in each.stats.steps_by_plan} == {"plain"}
