"""Compiled layers: the model's own law, by the weights as they are, past nothing that hangs on a module."""

import copy
import dataclasses
import os
import stat
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from blockroll.config import DraftConfig
from blockroll.errors import InvalidInput, MissingDependency
from blockroll.kernels.layers import build, layers_library
from blockroll.policies import compiled
from blockroll.policies.compiled import CompiledLayers
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
from tests.models import FAMILIES, VOCAB_SIZE, prompts, random_model
from tests.numerics.test_packed_rows import both_ways
from tests.twins import assert_same_laws, biased_model, laws, twins

OF_THE_SHAPE = [family for family in FAMILIES if family != "qwen3_moe"]


def has_compiler():
    try:
        return bool(layers_library(torch.float32))
    except MissingDependency:
        return False


pytestmark = pytest.mark.skipif(not has_compiler(), reason="there is no C compiler")


@pytest.fixture
def calls(monkeypatch):
    """Rows of every forward that compiled layers have run."""
    rows, run_rows = [], CompiledLayers._run

    def counted(self, x_BRW, *rest):
        rows.append(x_BRW.shape[0] * x_BRW.shape[1])
        return run_rows(self, x_BRW, *rest)

    monkeypatch.setattr(CompiledLayers, "_run", counted)
    return rows


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


@pytest.mark.parametrize("path", ["", "layers.0", "layers.1.mlp", "layers.0.self_attn.q_proj", "norm"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_met(path, kind, calls):
    quick, _ = policies()
    laws(quick)
    del calls[:]
    met = []
    handle = getattr(quick.model.model.get_submodule(path), kind)(lambda *_: met.append(1))
    laws(quick)
    assert met
    assert not calls
    handle.remove()
    laws(quick)
    assert calls


def test_a_wrapped_projection_is_not_passed_over(calls):
    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    pair = policies()
    laws(pair[0])
    for policy in pair:
        attention = policy.model.model.layers[0].self_attn
        attention.v_proj = Doubled(attention.v_proj).eval()
    del calls[:]
    assert_same_laws(*pair)
    assert not calls


def test_training_meets_no_compiled_layer(calls):
    quick, own = policies()
    laws(quick)
    del calls[:]
    ids_BT = torch.randint(4, VOCAB_SIZE, (2, 9))
    gradients = []
    for policy in (quick, own):
        logits_BTV = policy.model(ids_BT).logits
        F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
        gradients.append([parameter.grad for parameter in policy.model.parameters()])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))
    assert not calls


def test_autocast_goes_through_the_modules(calls):
    quick, own = policies()
    laws(quick)
    del calls[:]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(laws(quick), laws(own))
    assert not calls


def test_a_policy_that_moves_to_another_type_decodes_on():
    quick, own = policies()
    laws(quick)
    for dtype in (torch.float64, torch.bfloat16):
        for policy in (quick, own):
            policy.model.to(dtype)
        assert float((laws(quick) - laws(own)).abs().max()) <= (0.1 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("slower_from", [1, 32, 1000])
def test_auto_serves_as_many_rows_as_are_faster(monkeypatch, slower_from):
    monkeypatch.setattr(compiled, "_LEAST_WIDTH", 0)
    monkeypatch.setattr(compiled, "_seconds", lambda work: work())
    monkeypatch.setattr(CompiledLayers, "_compiled_once", lambda self, rows: 1.0)
    monkeypatch.setattr(CompiledLayers, "_own_once", lambda self, rows: 0.5 if rows >= slower_from else 2.0)
    policy = HFPolicy(random_model(), prepack="off")
    laws(policy)
    assert policy.compiled.most_rows == {1: 0, 32: 16, 1000: 320}[slower_from]


def test_auto_measures_real_forwards(monkeypatch):
    monkeypatch.setattr(compiled, "_LEAST_WIDTH", 0)
    policy, (_, own) = HFPolicy(random_model(), prepack="off"), policies()
    assert_same_laws(policy, own)


def test_without_a_compiler_the_modules_serve_and_it_is_said(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(compiled, "_LEAST_WIDTH", 0)
    monkeypatch.setattr(compiled, "layers_library", build.layers_library.__wrapped__)
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", os.fspath(broken))
    policy, own = (HFPolicy(random_model(), prepack="off", compile=each) for each in ("auto", "off"))
    assert_same_laws(policy, own)
    assert "decoding is slower on this CPU" in caplog.text
    assert "out of order" in caplog.text
    with pytest.raises(MissingDependency, match="set CC to another one"):
        HFPolicy(random_model(), compile="on")


def test_a_cache_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BLOCKROLL_CACHE", os.fspath(tmp_path / "file"))
    with pytest.raises(MissingDependency, match="set BLOCKROLL_CACHE"):
        layers_library.__wrapped__(torch.float32)


def test_stale_keys_and_values_are_not_read():
    """Beyond what a row sees may stand anything but NaN; behind the last that any row sees, that too."""
    from blockroll.rollout.engine.cache import SlotCache

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
