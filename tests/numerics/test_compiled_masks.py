"""Compiled layers under a draft adapter's masks: its updates as they are, on mask rows and on no other."""

import copy

import pytest
import torch

from blockroll.policies import compiled
from blockroll.policies.adapter import AdapterConfig, DraftAdapter, LowRank
from blockroll.policies.compiled import CompiledLayers
from blockroll.policies.compiled_updates import CompiledUpdates
from blockroll.policies.growing_window import GrowingWindow
from blockroll.policies.hf import HFPolicy
from blockroll.policies.layout import two_forward_rows
from blockroll.policies.prepacked import law_gap
from blockroll.rollout.engine.cache.slots import SlotCache
from blockroll.types import Plan, Sampling
from tests.engines import make_requests, run
from tests.equality import assert_same_rollouts
from tests.models import prompts, random_adapter, random_model
from tests.numerics.test_compiled import OF_THE_SHAPE, has_compiler
from tests.numerics.test_compiled_serving import interrupted
from tests.twins import assert_same_laws, biased_model, laws, twins

pytestmark = pytest.mark.skipif(not has_compiler(), reason="there is no C compiler")
_BFLOAT16 = 0.06  # log-probabilities; without the updates they move by 0.2 and more


@pytest.fixture
def served(monkeypatch):
    """First updated row of every forward that compiled layers have run with updates."""
    first_rows, run_rows = [], CompiledLayers._run

    def noted(self, x_BRW, positions_BR, window, attended, updates=None, first=0):
        if updates is not None:
            first_rows.append(first)
        return run_rows(self, x_BRW, positions_BR, window, attended, updates, first)

    monkeypatch.setattr(CompiledLayers, "_run", noted)
    return first_rows


def pair(family="llama", **options):
    return twins("compile", family, with_adapter=True, prepack="off", **options)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family", OF_THE_SHAPE)
def test_masks_have_the_same_law(family, threads, served):
    quick, own = pair(family)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same_laws(quick, own)
    finally:
        torch.set_num_threads(before)
    assert {1, 4} <= set(
        served
    )  # behind the anchor of a draft forward, behind the verify rows of a fused one


@pytest.mark.parametrize("family", OF_THE_SHAPE)
def test_masks_have_the_same_law_in_bfloat16(family, served):
    quick, own = pair(family, dtype=torch.bfloat16)
    for policy in (quick, own):
        _scaled(policy.adapter, 0.3)  # random ones of full size leave laws of one token
    gap, _ = law_gap(laws(own), laws(quick), torch.bfloat16)
    assert served
    assert gap <= _BFLOAT16


@pytest.mark.parametrize("rank", [1, 4, 16, 33])
@pytest.mark.parametrize("size", [{}, {"hidden_size": 36, "head_dim": 6}, {"intermediate_size": 301}])
def test_any_rank_and_any_size(rank, size, served):
    config = copy.deepcopy(random_model().config)
    for name, value in size.items():
        setattr(config, name, value)
    torch.manual_seed(2)
    model = type(random_model())(config).eval()
    made = []
    for value in ("on", "off"):
        policy = HFPolicy(copy.deepcopy(model), compile=value, prepack="off")
        policy.use_adapter(_random(policy, rank=rank))
        made.append(policy)
    assert_same_laws(*made)
    assert served


def test_projections_with_a_bias(served):
    made = []
    for value in ("on", "off"):
        torch.manual_seed(3)
        policy = HFPolicy(biased_model("attention_bias"), compile=value, prepack="off")
        policy.use_adapter(random_adapter(policy))
        made.append(policy)
    assert_same_laws(*made)
    assert served


def test_rows_may_all_be_masks(served):
    states = []
    for policy in pair():
        cache = SlotCache(policy, num_slots=2, capacity=32)
        prompt_BR = torch.tensor([[4, 6, 8], [9, 5, 4]])
        policy.prefill(prompt_BR, cache.window(0, 2, 3))
        cache.commit(0, prompt_BR.tolist())
        with torch.inference_mode():
            layout = two_forward_rows(0, 5)
            states.append(policy.hidden(prompt_BR[:, :0], layout, cache.window(0, 2, 5)))
    assert 0 in served
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", [Plan(3), Plan(3, (0, 3))], ids=str)
def test_rollouts_are_those_of_the_models_own_modules(plan, served):
    quick, own = pair()
    requests = make_requests(prompts(8), Sampling(max_tokens=16))
    want = run(own, requests, plan, max_batch_size=4)
    assert_same_rollouts(want, run(quick, requests, plan, max_batch_size=4), own)
    assert served


def _in_place(policy, values):
    with torch.no_grad():
        for name, parameter in policy.adapter.named_parameters():
            parameter.copy_(values[name])


def _loaded(policy, values):
    policy.adapter.load_state_dict(values)


def _by_an_optimizer(policy, values):
    for name, parameter in policy.adapter.named_parameters():
        parameter.grad = parameter.detach() - values[name]
    torch.optim.SGD(policy.adapter.parameters(), lr=1.0).step()


def _behind_its_back(policy, values):
    for name, parameter in policy.adapter.named_parameters():
        parameter.data = values[name].clone()


def _unseen_and_said(policy, values):
    for name, parameter in policy.adapter.named_parameters():
        parameter.data.copy_(values[name])
    policy.weights_changed()


def _by_another_adapter(policy, values):
    policy.use_adapter(random_adapter(policy))
    _loaded(policy, values)


WRITES = [_in_place, _loaded, _by_an_optimizer, _behind_its_back, _unseen_and_said, _by_another_adapter]


@pytest.mark.parametrize("write", WRITES)
def test_an_adapter_that_is_written_serves_at_once(write, served):
    quick, own = pair()
    laws(quick)
    _written(write, quick, own)
    del served[:]
    assert_same_laws(quick, own)
    assert served


def test_nothing_else_lies_where_the_adapter_lay_when_it_was_copied():
    """A tensor there would be taken for the one that was copied."""
    quick, _ = pair()
    laws(quick)
    parameters = [*quick.adapter.updates.parameters()]
    copied = {parameter.data_ptr() for parameter in parameters}
    for _ in range(20):
        for parameter in parameters:
            parameter.data = parameter.data.clone()
            assert parameter.data_ptr() not in copied


def test_an_interrupt_while_laws_are_compared_switches_nothing_off(monkeypatch, served):
    quick, own = pair()
    compare, rounds = compiled.is_same_law, iter([False, True])  # rows without masks come first

    def is_same_law(*given):
        return interrupted() if next(rounds) else compare(*given)

    with monkeypatch.context() as patch:
        patch.setattr(compiled, "is_same_law", is_same_law)
        with pytest.raises(KeyboardInterrupt):
            laws(quick)
    assert_same_laws(quick, own)
    assert served


def test_stale_copies_are_caught(monkeypatch):
    """Planted: copies are made once."""
    refresh = CompiledUpdates.refresh
    monkeypatch.setattr(
        CompiledUpdates, "refresh", lambda self, dtype: bool(self._layers) or refresh(self, dtype)
    )
    quick, own = pair()
    laws(quick)
    _written(_in_place, quick, own)
    with pytest.raises(AssertionError):
        assert_same_laws(quick, own)


@pytest.fixture
def updates_on_clean_rows(monkeypatch):
    """Planted: the anchor and the rows to verify get updates as well."""
    rows = compiled.UpdatedRows
    monkeypatch.setattr(compiled, "UpdatedRows", lambda first, *rest: rows(first - 1, *rest))


@pytest.mark.usefixtures("updates_on_clean_rows")
def test_updates_on_clean_rows_are_caught(monkeypatch):
    monkeypatch.setattr(compiled, "is_same_law", lambda *_: True)
    quick, own = pair()
    with pytest.raises(AssertionError):
        assert_same_laws(quick, own)


@pytest.mark.usefixtures("updates_on_clean_rows")
@pytest.mark.parametrize("begins_at_zero", [False, True])
def test_masks_of_another_law_go_through_the_modules_and_it_is_said(begins_at_zero, caplog, served):
    quick, own = pair()
    if begins_at_zero:  # as an untrained adapter does, of which every comparison finds the same law
        quick.use_adapter(_random(quick, rank=3, scale=0.0))
        laws(quick)
        assert served
        assert not caplog.text
        _loaded(quick, own.adapter.state_dict())
    assert_same_laws(quick, own)
    assert "compiled layers serve no masks: log-probabilities move" in caplog.text
    del served[:]
    laws(quick)
    assert not served
    assert quick.compiled.most_rows > 0  # for rows without masks


def _hooked(policy):
    update = policy.adapter.updates["layers_0_mlp_up_proj"]
    update.register_forward_hook(lambda module, inputs, output: 2 * output - inputs[1])


def _without_a_hook(policy):
    policy.model.model.layers[1].mlp.down_proj._forward_hooks.clear()


class _Doubled(LowRank):
    def forward(self, x, base, first_row):
        return super().forward(x, super().forward(x, base, first_row), first_row)


def _of_another_kind(policy):
    policy.adapter.updates["layers_1_self_attn_q_proj"].__class__ = _Doubled


@pytest.mark.parametrize("change", [_hooked, _without_a_hook, _of_another_kind])
def test_an_adapter_that_does_something_else_goes_through_the_modules(change, served):
    quick, own = pair()
    laws(quick)
    for policy in (quick, own):
        change(policy)
    del served[:]
    assert_same_laws(quick, own)
    assert not served


def _written(write, quick, own):
    """Other values for both."""
    values = random_adapter(own, seed=5).state_dict()
    write(quick, values)
    own.use_adapter(random_adapter(own))
    _loaded(own, values)


def _scaled(adapter, factor):
    with torch.no_grad():
        for parameter in adapter.updates.parameters():
            parameter.mul_(factor)


def _random(policy, *, rank, scale=0.5):
    adapter = DraftAdapter(
        policy.model,
        AdapterConfig(family="llama", rank=rank, block_sizes=(4,), layouts=("two_forward", "fused")),
    )
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        adapter.mask_embedding.copy_(torch.randn(adapter.mask_embedding.shape, generator=generator))
        for update in adapter.updates.values():
            for parameter in update.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            update.up.mul_(scale / rank)
    return adapter


def test_the_first_forward_decides_for_masks_too(served):
    quick, _ = pair()
    quick.verify_logits(torch.tensor([[1, 2, 3]]), GrowingWindow(1).grown(3))
    assert quick.compiled._updates is not None
    assert quick.compiled._updates.is_compared
