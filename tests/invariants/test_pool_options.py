"""Every option of `RolloutPool.from_pretrained` takes effect, or is refused with the name it has here."""

import logging

import pytest
import torch

from blockroll import RolloutConfig, RolloutPool, Sampling
from blockroll.errors import InvalidInput, WeightSyncError
from blockroll.policies.loading import load_tokenizer
from blockroll.rollout.pool.weight_sync import named_weights, weights_checksum
from tests.models import random_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An ordinary one, which was never taught to draft."""
    folder = tmp_path_factory.mktemp("policy")
    model = random_model()
    del model.config.blockroll
    model.save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    return folder


def engine_of(pool):
    return pool._members[0].replica.engine


def test_sampling_options_are_those_of_requests_without_their_own():
    with RolloutPool.from_pretrained(
        "tiny", temperature=0, max_tokens=3, top_k=5, mix_weight=1.0, min_p=0.1, device="cpu"
    ) as pool:
        assert (pool.sampling.temperature, pool.sampling.max_tokens) == (0, 3)
        assert (pool.sampling.top_k, pool.sampling.min_p) == (5, 0.1)
        requests = pool.requests(["1+1=?\n"], num_samples=3)
        rollouts = list(pool.generate(requests))
        assert len({rollout.token_ids for rollout in rollouts}) == 1
        assert all(len(rollout.token_ids) <= 3 for rollout in rollouts)
        (own,) = pool.requests(["1+1=?\n"], Sampling(max_tokens=5))
        assert own.sampling == Sampling(max_tokens=5)


def test_options_of_the_policy_and_of_the_engine_take_effect(checkpoint, tmp_path):
    with RolloutPool.from_pretrained(
        checkpoint, dtype=torch.bfloat16, device="cpu", plan="plain", max_batch_size=3, max_length=50,
        num_replicas=2, audit="all", audit_dir=tmp_path,
    ) as pool:  # fmt: skip
        engine = engine_of(pool)
        assert next(engine.policy.model.parameters()).dtype == torch.bfloat16
        assert (engine.plan.name, engine.limits.max_length, len(pool.states)) == ("plain", 50, 2)
        assert engine._scheduler.max_batch_size == 3
        assert engine._observers.want_all


def test_an_ordinary_checkpoint_just_works_and_the_log_says_once_that_it_has_no_drafts(checkpoint, caplog):
    with caplog.at_level(logging.WARNING), RolloutPool.from_pretrained(checkpoint, num_replicas=2) as pool:
        assert engine_of(pool).planner is not None
        assert len(list(pool.generate(pool.requests([[5, 6, 7]], num_samples=3)))) == 3
    (said,) = [record.message for record in caplog.records if "from history alone" in record.message]
    assert "blockroll convert" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 0}, r"no option 'temprature'; did you mean 'temperature'\?"),
        ({"max_new_tokens": 5}, r"no option 'max_new_tokens'; .*`max_tokens`"),
        ({"n": 2}, r"no option 'n'; .*`num_samples` of `requests`"),
        ({"num_return_sequences": 2}, "`num_samples` of `requests`"),
        ({"seed": 1}, r"no option 'seed'; give it to `requests`"),
        ({"logprobs": 1}, "`policy_logprobs` and `behavior_logprobs`"),
        ({"do_sample": True}, "`temperature` of `Sampling` decides"),
        ({"torch_dtype": "bfloat16"}, "it is `dtype`"),
        ({"wholly_unknown_zzz": 1}, "allowed are adapter, audit"),
        ({"temperature": -1}, "temperature must be"),
        ({"threads_per_replica": 2}, "threads_per_replica has an effect only with backend='ray'"),
        ({"gpus_per_replica": 0.5}, "gpus_per_replica has an effect only with backend='ray'"),
        ({"audit_dir": "audit"}, "audit_dir has an effect only with audit='all'"),
        ({"audit": "all", "audit_dir": "a", "audit_share": 0.5}, "audit_share has an effect only"),
        ({"mix_weight": 0.5, "temperature": 0}, "no greedy form"),
        ({"mix_weight": 0.5, "top_k": 3}, "truncation"),
        ({"dtype": "float8"}, "dtype must be one of 'float32'"),
    ],
)
def test_an_option_without_effect_is_refused_by_name(options, message):
    with pytest.raises(InvalidInput, match=message):
        RolloutPool.from_pretrained("tiny", **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("n", "`num_samples`"),
        ("seed", "`requests`"),
        ("logprobs", "`policy_logprobs`"),
        ("max_new_tokens", "`max_tokens`"),
        ("do_sample", "`temperature`"),
        ("num_return_sequences", "`num_samples`"),
        ("temprature", "'temperature'"),
    ],
)
def test_sampling_and_requests_name_ours_for_the_options_of_others(name, message):
    with pytest.raises(InvalidInput, match=f"Sampling has no option '{name}'; .*{message}"):
        Sampling(**{name: 1})
    if name not in ("seed", "temprature"):
        with (
            RolloutPool.from_pretrained("tiny") as pool,
            pytest.raises(InvalidInput, match=f"RolloutPool.requests has no option '{name}'; .*{message}"),
        ):
            pool.requests(["a"], **{name: 1})


@pytest.mark.parametrize(
    ("options", "replica_kind", "is_separate"),
    [
        ({}, "ray", False),
        ({"backend": "ray"}, "ray", True),
        ({"backend": "local"}, "local", False),
        ({"placement": "separate"}, "ray", True),
        ({"placement": "colocated"}, "local", False),
        ({"backend": "ray", "placement": "colocated"}, "ray", False),  # each caller's own says it
        ({"backend": "local", "placement": "separate"}, "local", True),
    ],
)
def test_backend_and_placement_mean_the_same_to_both_kinds_of_caller(options, replica_kind, is_separate):
    config = RolloutConfig(**options)
    assert (config.replica_kind, config.is_separate) == (replica_kind, is_separate)


def test_sync_publishes_a_learners_weights_in_the_replicas_precision(checkpoint):
    learner = random_model(seed=3)
    with RolloutPool.from_pretrained(checkpoint, dtype="bfloat16", device="cpu") as pool:
        (receipt,) = pool.sync(torch.nn.parallel.DataParallel(learner))
        assert (receipt.accepted, pool.version) == (True, 1)
        assert receipt.checksum == weights_checksum(named_weights(learner.to(torch.bfloat16)))
        (receipt,) = pool.sync(random_model(seed=4))
        assert (receipt.version, pool.states) == (2, ("READY",))
        with pytest.raises(WeightSyncError, match="version 3 is for other weights"):
            pool.sync(torch.nn.Linear(2, 2))
        assert pool.version == 2


def test_what_holds_no_weights_is_refused_before_a_replica_hears_of_it(checkpoint):
    with torch.device("meta"):
        empty = torch.nn.Linear(2, 2)
    with RolloutPool.from_pretrained(checkpoint, device="cpu") as pool:
        for given, said in (
            ("folder", "a torch module, the learner's model, got str"),
            (random_model(seed=3).state_dict(), "got OrderedDict; of a policy give its .model"),
            (None, "got NoneType"),
            (empty, "'weight' is on the meta device and holds no data"),
        ):
            with pytest.raises(InvalidInput, match=said):
                pool.sync(given)
        assert (pool.version, pool.states) == (0, ("READY",))
