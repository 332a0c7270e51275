"""When compiled layers serve: where nothing hangs on a module, where they are faster and can be built."""

import os
import stat

import pytest
import torch
from torch.nn import functional as F

from blockroll.errors import MissingDependency
from blockroll.kernels.layers import build, layers_library
from blockroll.policies import compiled
from blockroll.policies.compiled import CompiledLayers
from blockroll.policies.hf import HFPolicy
from tests.models import VOCAB_SIZE, random_model
from tests.numerics.test_compiled import has_compiler, policies
from tests.twins import assert_same_laws, laws

pytestmark = pytest.mark.skipif(not has_compiler(), reason="there is no C compiler")


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


@pytest.mark.parametrize("path", ["lm_head", "model.layers.0.mlp.up_proj"])
def test_a_forward_of_a_modules_own_is_met(path):
    pair = policies()
    laws(pair[0])
    for policy in pair:
        module = policy.model.get_submodule(path)
        module.forward = lambda x, own=module.forward: 2 * own(x)
    assert_same_laws(*pair)


def test_embeddings_of_another_type_are_refused_as_the_modules_refuse_them():
    for policy in policies():
        laws(policy)
        policy.model.model.embed_tokens.double()
        with pytest.raises(RuntimeError, match="dtype"):
            laws(policy)


def test_an_interrupt_while_laws_are_compared_switches_nothing_off(monkeypatch, calls):
    quick, own = policies()
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "is_same_law", interrupted)
        with pytest.raises(KeyboardInterrupt):
            laws(quick)
    assert_same_laws(quick, own)
    assert calls


def interrupted(*_):
    raise KeyboardInterrupt


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
    monkeypatch.setattr(compiled, "seconds_of", lambda work: work())
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
