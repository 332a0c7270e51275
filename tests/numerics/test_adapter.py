"""The draft adapter: mask rows meet it, clean rows never do.

Bits are compared where both sides run the same kernels on the same shapes: what mask rows hold must not move
one bit of a clean row.
"""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockroll.errors import AdapterMismatch, InvalidInput
from blockroll.policies.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdapterConfig,
    DraftAdapter,
    parent_hash,
)
from blockroll.policies.hf import HFPolicy
from tests.models import FAMILIES, adapted_policy, prompts, random_adapter, random_model, random_policy
from tests.numerics.test_policy import NUM_DRAFTS, plain_logits, prefilled, random_drafts

LEVELS = (0, 2, NUM_DRAFTS)
FUSED_ROWS = (NUM_DRAFTS + 1) * (len(LEVELS) + 1)


@pytest.fixture(params=FAMILIES)
def policy(request):
    return adapted_policy(request.param)


def all_logits(policy):
    """Causal rows of a verify, a fused and a draft forward; then drafts and proposals, on the same texts."""
    texts = prompts(6)
    cache, anchors = prefilled(policy, texts)
    ids = torch.cat([anchors[:, None], random_drafts(len(texts))], dim=1)
    verify = policy.verify_logits(ids, cache.window(0, len(texts), NUM_DRAFTS + 1))
    rows = policy.draft_logits(anchors[:, None], NUM_DRAFTS, cache.window(0, len(texts), NUM_DRAFTS + 1))
    fused = policy.fused_rows(ids, LEVELS, cache.window(0, len(texts), FUSED_ROWS))
    proposal = policy.proposal_logits(fused.proposal_states_BPLW[:, 1])
    return verify, fused.verify_logits_BLV, rows[:, :1], rows[:, 1:], proposal


def test_causal_logits_are_bit_identical_with_and_without_the_adapter(policy):
    bare = HFPolicy(random_model(policy.model.config.model_type))
    texts = prompts(6)
    results, finals = [], []
    for subject in (bare, policy):
        cache, anchors = prefilled(subject, texts)
        ids = torch.cat([anchors[:, None], random_drafts(len(texts))], dim=1)
        results.append(subject.verify_logits(ids, cache.window(0, len(texts), NUM_DRAFTS + 1)))
        finals.append(plain_logits(subject, texts[0]))
    assert torch.equal(*results)
    assert torch.equal(*finals)
    assert bare.model.state_dict().keys() == policy.model.state_dict().keys()
    assert parent_hash(bare.model) == parent_hash(policy.model)


def test_verify_logits_are_bit_identical_whatever_the_adapter_holds(policy):
    before = all_logits(policy)
    with torch.no_grad():
        for parameter in policy.adapter.parameters():
            parameter.mul_(-7.0)
    after = all_logits(policy)
    is_mixture = policy.model.config.model_type == "qwen3_moe"
    for mine, other in zip(before[:3], after[:3], strict=True):
        if is_mixture:  # the sizes of its groups of tokens change
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
        else:
            assert torch.equal(mine, other)
    for mine, other in zip(before[3:], after[3:], strict=True):
        assert (mine - other).abs().amax(dim=(1, 2)).min() > 1e-3


def test_every_kind_of_parameter_reaches_the_drafts(policy):
    before = all_logits(policy)[3]
    for name, parameter in policy.adapter.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.5)
        assert not torch.equal(all_logits(policy)[3], before), name
        with torch.no_grad():
            parameter.copy_(kept)
    assert torch.equal(all_logits(policy)[3], before)


def test_an_untrained_adapter_changes_nothing_but_the_embedding():
    policy = HFPolicy(random_model())
    policy.use_adapter(DraftAdapter(policy.model, AdapterConfig(family="llama", rank=4)))
    before = all_logits(policy)[3]
    with torch.no_grad():
        for update in policy.adapter.updates.values():
            update.down.mul_(3.0)
    assert torch.equal(all_logits(policy)[3], before)


@pytest.mark.parametrize("level", range(NUM_DRAFTS + 1))
def test_the_proposal_of_a_level_equals_a_fresh_draft_forward_after_as_many_accepted_drafts(policy, level):
    texts = prompts(5)
    drafts = random_drafts(len(texts))
    cache, anchors = prefilled(policy, texts)
    ids = torch.cat([anchors[:, None], drafts], dim=1)
    levels = tuple(sorted({0, level}))
    fused = policy.fused_rows(ids, levels, cache.window(0, len(texts), (NUM_DRAFTS + 1) * (len(levels) + 1)))
    got = policy.proposal_logits(fused.proposal_states_BPLW[:, levels.index(level)])
    cache.commit(0, ids[:, :level].tolist())
    fresh = policy.draft_logits(
        ids[:, level, None], NUM_DRAFTS + 1, cache.window(0, len(texts), NUM_DRAFTS + 2)
    )
    torch.testing.assert_close(got, fresh[:, 1:], atol=1e-4, rtol=0)


def test_an_adapter_survives_the_disk_and_fits_other_weights_of_the_architecture(policy, tmp_path):
    family = policy.model.config.model_type
    policy.adapter.save_pretrained(tmp_path)
    other = HFPolicy(random_model(family, seed=5))
    adapter = DraftAdapter.from_pretrained(tmp_path, other.model)
    assert adapter.config == policy.adapter.config
    for name, tensor in policy.adapter.state_dict().items():
        assert torch.equal(adapter.state_dict()[name], tensor)
    other.use_adapter(adapter)
    assert other.trained_drafts == 4
    all_logits(other)


def test_an_adapter_beside_the_weights_is_used_unasked(tmp_path):
    policy = adapted_policy()
    policy.save_pretrained(tmp_path)
    loaded = HFPolicy.from_pretrained(tmp_path, with_tokenizer=False)
    assert loaded.adapter is not None
    for mine, theirs in zip(all_logits(policy), all_logits(loaded), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_a_policy_takes_another_adapter_and_forgets_the_first():
    policy = adapted_policy()
    fresh = adapted_policy()
    second = random_adapter(policy, seed=9)
    policy.use_adapter(second)
    fresh.adapter.load_state_dict(second.state_dict())
    assert torch.equal(all_logits(policy)[3], all_logits(fresh)[3])


def test_an_adapter_takes_the_place_of_a_mask_token():
    policy = random_policy()
    policy.use_adapter(random_adapter(policy))
    assert policy.mask_token_id is None
    all_logits(policy)


def test_a_policy_without_masks_says_how_to_get_them():
    policy = HFPolicy(random_model())
    policy.mask_token_id = None
    cache, anchors = prefilled(policy, prompts(2))
    with pytest.raises(InvalidInput, match="blockroll convert"):
        policy.draft_logits(anchors[:, None], 2, cache.window(0, 2, 3))


class TestMismatch:
    """An adapter that does not fit is refused by name, and leaves no hook behind."""

    @pytest.fixture
    def folder(self, tmp_path):
        adapted_policy().adapter.save_pretrained(tmp_path)
        return tmp_path

    def refused(self, folder, match, family="llama", **shape):
        model = random_model(family)
        with pytest.raises(AdapterMismatch, match=match):
            DraftAdapter.from_pretrained(folder, model)
        assert not any(module._forward_hooks for module in model.modules())

    def test_another_family(self, folder):
        self.refused(folder, "made for the family 'llama', the policy is 'qwen3'", family="qwen3")

    def test_a_missing_tensor(self, folder):
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        name = next(iter(sorted(tensors)))
        del tensors[name]
        save_file(tensors, folder / ADAPTER_WEIGHTS)
        self.refused(folder, f"{name} is missing")

    def test_an_unknown_tensor(self, folder):
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        save_file({**tensors, "updates.nowhere.up": torch.zeros(2, 2)}, folder / ADAPTER_WEIGHTS)
        self.refused(folder, "updates.nowhere.up is not part of this architecture")

    def test_another_shape(self, folder):
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        save_file({**tensors, "mask_embedding": torch.zeros(33)}, folder / ADAPTER_WEIGHTS)
        self.refused(folder, r"mask_embedding has shape \(33,\), this policy needs \(32,\)")

    def test_no_adapter_at_all(self, tmp_path):
        self.refused(tmp_path, "no draft adapter in")

    def test_a_config_of_another_version(self, folder):
        values = json.loads((folder / ADAPTER_CONFIG).read_text())
        (folder / ADAPTER_CONFIG).write_text(json.dumps({**values, "colour": "blue"}))
        self.refused(folder, "not a draft adapter of this version")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("draft_adapter.json", b""),
        ("draft_adapter.json", b"[]"),
        ("draft_adapter.json", b"\xff"),
        ("draft_adapter.safetensors", b""),
        ("draft_adapter.safetensors", b"not weights"),
        ("draft_adapter.safetensors", None),
    ],
)
def test_a_damaged_adapter_is_refused_by_the_name_of_its_file(tmp_path, name, content):
    policy = random_policy()
    random_adapter(policy).save_pretrained(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(AdapterMismatch, match=rf"{name} (cannot be read|is not a draft adapter)"):
        DraftAdapter.from_pretrained(tmp_path, policy.model)


def test_an_adapter_that_is_not_finite_is_refused(tmp_path):
    policy = random_policy()
    adapter = random_adapter(policy)
    with torch.no_grad():
        adapter.mask_embedding[3] = torch.nan
    adapter.save_pretrained(tmp_path)
    with pytest.raises(AdapterMismatch, match="holds NaN or infinity in mask_embedding"):
        DraftAdapter.from_pretrained(tmp_path, policy.model)


def test_the_parent_hash_changes_with_any_weight():
    model = random_model()
    before = parent_hash(model)
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[0] += 1e-6
    assert parent_hash(model) != before


def test_the_config_is_kept_as_it_was_made(tmp_path):
    policy = HFPolicy(random_model())
    config = AdapterConfig(
        family="llama", rank=2, block_sizes=(4, 8), layouts=("fused",), parent_hash="ab", trained_tokens=7
    )
    adapter = DraftAdapter(policy.model, config)
    adapter.save_pretrained(tmp_path)
    adapter.remove()
    loaded = DraftAdapter.from_pretrained(tmp_path, policy.model)
    assert dataclasses.asdict(loaded.config) == dataclasses.asdict(config)
