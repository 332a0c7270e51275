"""Packed copies of the linear weights: the same law, made anew with every change, and no part of training."""

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from blockroll.errors import InvalidInput
from blockroll.policies import prepacked
from blockroll.policies.hf import HFPolicy
from blockroll.policies.prepacked import PackedLinears, can_pack
from blockroll.policy_check.check import check_policy
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.cache.slots import SlotCache
from blockroll.rollout.pool.replica import LocalReplica
from blockroll.rollout.pool.weight_sync import make_update, named_weights
from blockroll.rollout.pool.weight_sync.buckets import weights_checksum
from blockroll.types import Plan, Sampling
from tests.engines import make_requests, run
from tests.equality import assert_same_rollouts
from tests.models import FAMILIES, VOCAB_SIZE, prompts, random_model
from tests.twins import assert_same_laws, biased_model, laws, twins

pytestmark = pytest.mark.skipif(
    not prepacked._packable(random_model()), reason="this torch cannot pack weights on this processor"
)


policies = partial(twins, "prepack")


@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_weights_give_the_same_law(family, with_adapter):
    packed, plain = policies(family, with_adapter=with_adapter)
    assert_same_laws(packed, plain)
    assert packed.packed.num_bytes > 0
    assert plain.packed.num_bytes == 0


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_modules_with_a_bias_keep_it(bias):
    model = biased_model(bias)
    assert_same_laws(HFPolicy(copy.deepcopy(model), prepack="on"), HFPolicy(model, prepack="off"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_contract_holds_with_packed_weights(dtype):
    if not can_pack(dtype):
        with pytest.raises(InvalidInput, match="as far as the processor takes them"):
            policies(dtype=dtype)
        assert check_policy(HFPolicy(random_model().to(dtype))).passed
        return
    packed, _ = policies(dtype=dtype)
    report = check_policy(packed)
    assert report.passed, str(report)
    assert packed.packed.num_bytes > 0


@pytest.mark.parametrize("plan", [Plan(0), Plan(3), Plan(3, (0, 3))], ids=str)
def test_rollouts_are_those_of_the_ordinary_weights(plan):
    packed, plain = policies()
    requests = make_requests(prompts(8), Sampling(max_tokens=16))
    want = run(plain, requests, plan, max_batch_size=4)
    assert_same_rollouts(want, run(packed, requests, plan, max_batch_size=4), plain)


def test_an_interrupt_while_laws_are_compared_switches_nothing_off(monkeypatch):
    packed, plain = policies()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PackedLinears, "_gap", interrupted)
        with pytest.raises(KeyboardInterrupt):
            laws(packed)
    assert_same_laws(packed, plain)
    assert packed.packed.num_bytes


def _served_after(write):
    """A replica that has decoded, then got other weights by `write`; and a policy made of those."""
    packed, other = policies()
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.5)
    laws(packed)
    replica = LocalReplica(Engine(packed, plan=Plan(0)), packed.model)
    write(replica, packed, other)
    return packed, other


def _by_update(replica, packed, other):
    update = make_update(named_weights(other.model), version=1, base_version=0, bucket_bytes=4096)
    assert replica.update(update).accepted


def _behind_its_back(replica, packed, other):
    """As PEFT and others write: torch counts no change of the parameter."""
    for mine, theirs in zip(packed.model.parameters(), other.model.parameters(), strict=True):
        mine.data.copy_(theirs)
    replica.weights_changed(1)


def _as_an_optimizer(replica, packed, other):
    with torch.no_grad():
        for mine, theirs in zip(packed.model.parameters(), other.model.parameters(), strict=True):
            mine.copy_(theirs)


def _by_exchange(replica, packed, other):
    for mine, theirs in zip(packed.model.modules(), other.model.modules(), strict=True):
        mine._parameters = dict(theirs._parameters)


WRITES = [_by_update, _behind_its_back, _as_an_optimizer, _by_exchange]


@pytest.mark.parametrize("write", WRITES)
def test_new_weights_serve_however_they_were_written(write):
    assert_same_laws(*_served_after(write))


def test_a_forgotten_refresh_is_caught(monkeypatch):
    """Planted: an update tells the policy nothing; and parameters are not looked at before a forward."""
    with monkeypatch.context() as patch:
        patch.setattr(HFPolicy, "weights_changed", lambda self: None)
        with pytest.raises(AssertionError):
            assert_same_laws(*_served_after(_behind_its_back))
    monkeypatch.setattr(prepacked._Group, "is_stale", False)
    with pytest.raises(AssertionError):
        assert_same_laws(*_served_after(_as_an_optimizer))


def test_what_is_held_are_the_parameters():
    packed, plain = policies()
    names = [*packed.model.state_dict()]
    laws(packed)
    assert [*packed.model.state_dict()] == names
    assert weights_checksum(list(named_weights(packed.model))) == weights_checksum(
        list(named_weights(plain.model))
    )
    assert_same_laws(HFPolicy(copy.deepcopy(packed.model), prepack="off"), plain)


def test_training_meets_no_packed_weight(monkeypatch):
    packed, plain = policies()
    laws(packed)
    monkeypatch.setattr(prepacked._Group, "product", lambda self, x: pytest.fail("a packed weight was read"))
    ids_BT = torch.randint(4, VOCAB_SIZE, (2, 9))
    gradients = []
    with packed.packed.serving(), torch.enable_grad():  # as another thread would train meanwhile
        for policy in (packed, plain):
            logits_BTV = policy.model(ids_BT).logits
            F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
            gradients.append([parameter.grad for parameter in policy.model.parameters()])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))
    with torch.no_grad():
        assert torch.equal(packed.model(ids_BT).logits, plain.model(ids_BT).logits)


def test_weights_that_change_the_law_are_off_and_say_so(monkeypatch, caplog):
    product = prepacked._Group.product
    monkeypatch.setattr(prepacked._Group, "product", lambda self, x: product(self, x) * 1.01)
    packed, plain = policies()
    assert torch.equal(laws(packed), laws(plain))
    assert packed.packed.num_bytes == 0
    assert "packed weights are off" in caplog.text


@pytest.mark.parametrize(("is_faster", "num_rows"), [(False, None), (True, 8)])
def test_auto_packs_what_is_faster(monkeypatch, is_faster, num_rows):
    """`num_rows`: the only product that gains; then fewer rows go through the ordinary weights."""
    monkeypatch.setattr(prepacked, "_LEAST_NUMBERS", 0)
    monkeypatch.setattr(prepacked, "_is_faster", lambda groups, rows: is_faster and rows == num_rows)
    policy, (_, plain) = HFPolicy(random_model()), policies()
    assert_same_laws(policy, plain)
    assert (policy.packed.num_bytes > 0) == is_faster
    ids_B1 = torch.tensor([[5]])
    one_row = [
        each.verify_logits(ids_B1, SlotCache(each, num_slots=1, capacity=4).window(0, 1, 1))
        for each in (policy, plain)
    ]
    assert torch.equal(*one_row)


def test_auto_leaves_small_weights_alone():
    policy = HFPolicy(random_model())
    laws(policy)
    assert policy.packed.num_bytes == 0


@pytest.mark.parametrize("is_told", [False, True])
def test_a_policy_that_moves_to_another_type_decodes_on(is_told):
    packed, plain = policies()
    laws(packed)
    packed.model.to(torch.float64)
    plain.model.to(torch.float64)
    if is_told:
        packed.weights_changed()
    assert_same_laws(packed, plain)
    assert packed.packed.num_bytes == 0


def test_on_is_refused_where_nothing_can_be_packed():
    with pytest.raises(InvalidInput, match="prepack is 'on'"):
        HFPolicy(random_model().double(), prepack="on")
