"""Compiled layers: the model's own law, by the weights as they are, past nothing that hangs on a module."""

import copy
import dataclasses
from functools import partial

import pytest
import torch

from blockroll.config import DraftConfig
from blockroll.errors import InvalidInput, MissingDependency
from blockroll.kernels.layers import layers_library
from blockroll.policies.draft_training import clean_pass
from blockroll.policies.hf import HFPolicy
from blockroll.policies.layer_shape import LayerShape
from blockroll.policy_check.check import check_policy
from blockroll.rl_loops.draft_trainer import DraftTrainer
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.pool.replica import LocalReplica
from blockroll.rollout.pool.weight_sync import make_update, named_weights
from blockroll.types import Plan, Sampling
from tests.engines import make_requests, run
from tests.equality import assert_same_rollouts, assert_same_rows
from tests.models import FAMILIES, prompts, random_model
from tests.numerics.test_packed_rows import both_ways
from tests.twins import assert_same_laws, biased_model, laws, twins

OF_THE_SHAPE = [family for family in FAMILIES if family != "qwen3_moe"]


def has_compiler():
    try:
        return bool(layers_library(torch.float32))
    except MissingDependency:
        return False


pytestmark = pytest.mark.skipif(not has_compiler(), reason="there is no C compiler")


policies = partial(twins, "compile", prepack="off")


@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("family", OF_THE_SHAPE)
def test_compiled_layers_give_the_same_law(family, with_adapter, calls):
    quick, own = policies(family, with_adapter=with_adapter)
    assert_same_laws(quick, own)
    assert len(calls) > 2  # more than the probe's


@pytest.mark.parametrize("family", OF_THE_SHAPE)
def test_a_window_may_keep_the_keys_and_values_it_is_given(family, calls):
    """As those of draft training and of the probe do; buffers that layers share would be the last layer's."""
    quick, own = policies(family)
    ids_BS = torch.tensor([[5, 9, 4, 7], [6, 8, 11, 4]])
    with torch.no_grad():
        kept = [clean_pass(policy, ids_BS, torch.tensor([4, 3]))[1].layers for policy in (quick, own)]
    assert calls
    for mine, theirs in zip(*kept, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_draft_training_measures_the_same_with_compiled_layers(calls):
    steps = []
    for policy in policies():
        rollouts = run(policy, make_requests(prompts(4), Sampling(max_tokens=12)), Plan(0))
        trainer = DraftTrainer(policy, DraftConfig(rank=4, block_sizes=(4,)))
        steps.append([dataclasses.asdict(trainer.step(list(rollouts.values()))) for _ in range(2)])
    assert calls
    assert_same_rows(*steps, tolerance=1e-3)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 6, 7, 11, 13])
def test_every_number_of_rows_has_its_tile(num_rows):
    quick, own = policies()
    requests = make_requests(prompts(num_rows), Sampling(max_tokens=3))
    want = run(own, requests, Plan(0), max_batch_size=num_rows)
    assert_same_rollouts(want, run(quick, requests, Plan(0), max_batch_size=num_rows), own)


@pytest.mark.parametrize(
    "size", [{"hidden_size": 36, "head_dim": 6}, {"intermediate_size": 63}, {"head_dim": 64}]
)
def test_sizes_that_no_vector_divides(size):
    model = random_model()
    config = copy.deepcopy(model.config)
    for name, value in size.items():
        setattr(config, name, value)
    torch.manual_seed(2)
    model = type(model)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    twin = copy.deepcopy(model)
    assert_same_laws(HFPolicy(model, compile="on"), HFPolicy(twin, compile="off"))


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_modules_with_a_bias_keep_it(bias):
    model = biased_model(bias)
    assert_same_laws(HFPolicy(copy.deepcopy(model), compile="on"), HFPolicy(model, compile="off"))


@pytest.mark.parametrize("family", OF_THE_SHAPE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_contract_holds_with_compiled_layers(family, dtype, calls):
    quick, _ = policies(family, dtype=dtype)
    report = check_policy(quick)
    assert report.passed, str(report)
    assert calls


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("plan", [Plan(0), Plan(3), Plan(3, (0, 3))], ids=str)
def test_rollouts_are_those_of_the_models_own_modules(plan, threads):
    quick, own = policies()
    requests = make_requests(prompts(8), Sampling(max_tokens=16))
    want = run(own, requests, plan, max_batch_size=4)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same_rollouts(want, run(quick, requests, plan, max_batch_size=4), own)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("family", OF_THE_SHAPE)
def test_packed_rows_are_those_of_padded_ones(family, calls):
    quick, own = policies(family)
    (padded, packed, *_), (_, expected, *_) = (both_ways(policy, prompts(6)) for policy in (quick, own))
    assert calls
    for found in (padded, packed):
        torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0)


def test_layers_of_another_shape_stay_as_they_are():
    with pytest.raises(InvalidInput, match="compile is 'on'"):
        HFPolicy(random_model("qwen3_moe"), compile="on")
    policy = HFPolicy(random_model("qwen3_moe"))
    laws(policy)
    assert policy.compiled.most_rows == 0


class WrongNorm(torch.nn.Module):
    """Computes with the root of the mean of squares at half the place that a norm looks at."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x):
        half = x.float()[..., : x.shape[-1] // 2]
        return (self.weight * x * torch.rsqrt(half.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(
            x
        )


def test_a_planted_norm_of_another_kind_is_caught_and_said(monkeypatch, caplog):
    """Planted: recognition takes any module with a weight for a norm."""
    monkeypatch.setattr("blockroll.policies.layer_shape._kind_of_norms", lambda norms: False)
    model = random_model()
    for layer in model.model.layers:
        layer.input_layernorm = WrongNorm(layer.input_layernorm)
    model.model.layers.eval()
    quick, own = HFPolicy(copy.deepcopy(model), compile="on"), HFPolicy(model, compile="off")
    assert_same_laws(quick, own)
    assert quick.compiled.most_rows == 0
    assert "compiled layers are off: log-probabilities move" in caplog.text


def test_a_norm_of_another_kind_is_not_recognised():
    model = random_model()
    model.model.layers[1].input_layernorm = WrongNorm(model.model.layers[1].input_layernorm)
    assert LayerShape.of(model) is None


def _by_update(replica, policy, other):
    update = make_update(named_weights(other.model), version=1, base_version=0, bucket_bytes=4096)
    assert replica.update(update).accepted


def _in_place(replica, policy, other):
    with torch.no_grad():
        for mine, theirs in zip(policy.model.parameters(), other.model.parameters(), strict=True):
            mine.copy_(theirs)


def _behind_its_back(replica, policy, other):
    for mine, theirs in zip(policy.model.parameters(), other.model.parameters(), strict=True):
        mine.data = theirs.data.clone()


def _by_exchange(replica, policy, other):
    for mine, theirs in zip(policy.model.modules(), other.model.modules(), strict=True):
        mine._parameters = dict(theirs._parameters)


WRITES = [_by_update, _in_place, _behind_its_back, _by_exchange]


def _served_after(write):
    quick, other = policies()
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.5)
    laws(quick)
    write(LocalReplica(Engine(quick, plan=Plan(0)), quick.model), quick, other)
    return quick, other


@pytest.mark.parametrize("write", WRITES)
def test_new_weights_serve_however_they_were_written(write, calls):
    quick, other = _served_after(write)
    del calls[:]
    assert_same_laws(quick, other)
    assert calls


def test_weights_that_are_not_looked_at_are_caught(monkeypatch):
    """Planted: addresses are taken once."""
    monkeypatch.setattr(LayerShape, "stamp", lambda self: [1])
    quick, other = policies()
    laws(quick)
    kept = [parameter.data for parameter in quick.model.parameters()]  # what addresses point to must live
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.5)
    _behind_its_back(None, quick, other)
    with pytest.raises(AssertionError):
        assert_same_laws(quick, other)
    assert kept


def test_stale_keys_and_values_are_not_read():
    """Beyond what a row sees may stand anything but NaN; behind the last that any row sees, that too."""
    from blockroll.rollout.engine.cache.slots import SlotCache

    quick, _ = policies()
    ids_B1 = torch.tensor([[5], [7]])
    found = []
    for stale in (0.0, 1e4):
        cache = SlotCache(quick, num_slots=2, capacity=40)
        quick.prefill(torch.tensor([[4, 6, 8], [9, 5, 4]]), cache.window(0, 2, 3))
        cache.commit(0, [[4, 6, 8], [9, 5, 4]])
        cache.fill_stale(stale)
        found.append(quick.verify_logits(ids_B1, cache.window(0, 2, 1)))
    assert torch.equal(*found)
