"""Verifying requests with different numbers of rows: packed forwards give what padded ones give."""

import pytest
import torch

from blockroll.kernels.block_attention import Packing
from blockroll.policies.base import VerifiesPacked
from blockroll.policies.hf import HFPolicy
from tests.models import FAMILIES, VOCAB_SIZE, prompts, random_model, random_policy
from tests.numerics.test_policy import TOLERANCE, prefilled
from tests.numerics.test_positions import BOUNDARY, KINDS, model, prompt

NUM_ROWS = (1, 4, 1, 6, 2, 1)
WIDTH = 7  # one wider than any needs


@pytest.fixture(params=FAMILIES)
def policy(request):
    return random_policy(request.param)


def both_ways(policy, texts, *, num_rows=NUM_ROWS, width=WIDTH, capacity=64):
    """Logits (N, V) of the same rows padded and packed, and the caches that the forwards have written."""
    generator = torch.Generator().manual_seed(1)
    drafts = torch.randint(4, VOCAB_SIZE, (len(texts), width - 1), generator=generator)
    packing = Packing.of(num_rows, width, policy.device)
    found, caches = [], []
    for is_packed in (False, True):
        cache, anchors = prefilled(policy, texts, capacity=capacity)
        ids = torch.cat([anchors[:, None], drafts], dim=1)
        if is_packed:
            found.append(policy.verify_packed(ids, packing, cache.packed_window(0, packing)))
        else:
            found.append(packing.pack(policy.verify_logits(ids, cache.window(0, len(texts), width)))[0])
        cache.commit(0, [row[:count] for row, count in zip(ids.tolist(), num_rows, strict=True)])
        caches.append(cache)
    return *found, *caches


def assert_same_keys(padded, packed, size, *, tolerance=TOLERANCE):
    for slot in range(size):
        for want, got in zip(padded.committed(slot), packed.committed(slot), strict=True):
            torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_packed_rows_have_the_logits_and_keys_of_padded_ones(policy):
    assert isinstance(policy, VerifiesPacked)
    padded, packed, *caches = both_ways(policy, prompts(6))
    assert packed.shape == (sum(NUM_ROWS), VOCAB_SIZE)
    torch.testing.assert_close(packed, padded, atol=TOLERANCE, rtol=0)
    assert_same_keys(*caches, 6)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_packed_rows_through_compiled_layers_are_those_of_padded_ones(family):
    policy = HFPolicy(random_model(family), compile="on")
    padded, packed, *caches = both_ways(policy, prompts(6))
    torch.testing.assert_close(packed, padded, atol=TOLERANCE, rtol=0)
    assert_same_keys(*caches, 6)
    assert policy.compiled.most_rows > sum(NUM_ROWS)


def test_packed_rows_under_autocast_are_those_of_padded_ones(policy):
    with torch.autocast("cpu", torch.bfloat16):
        padded, packed, *caches = both_ways(policy, prompts(6))
        again, _, _, _ = both_ways(policy, prompts(6), width=WIDTH + 5)
    assert caches[1].committed(0)[0].dtype == torch.bfloat16
    rounding = (padded - again).abs().max()
    assert (packed - padded).abs().max() <= max(4 * rounding, padded.abs().max() / 32)


def test_packed_rows_in_bfloat16_are_those_of_padded_ones(policy):
    policy.model.to(torch.bfloat16)
    padded, packed, _, _ = both_ways(policy, prompts(6))
    assert (packed - padded).abs().max() <= padded.abs().max() / 32


@pytest.mark.parametrize("family", KINDS)
def test_each_packed_row_has_the_rotary_factors_of_its_text(family):
    policy = HFPolicy(model(family, KINDS[family]))
    lengths = (BOUNDARY - 3, BOUNDARY + 9, 5, BOUNDARY + 1, 3, BOUNDARY)
    padded, packed, *caches = both_ways(policy, [prompt(length) for length in lengths])
    torch.testing.assert_close(packed, padded, atol=TOLERANCE, rtol=0)
    assert_same_keys(*caches, 6)


def test_a_packed_forward_computes_and_writes_no_other_rows(policy):
    cache, anchors = prefilled(policy, prompts(6))
    cache.fill_stale(0.5)
    packing = Packing.of(NUM_ROWS, WIDTH, policy.device)
    seen = []
    hooks = [
        module.register_forward_hook(
            lambda _module, inputs, _output: seen.append(inputs[0].shape[:-1].numel())
        )
        for module in policy.model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    ids = anchors[:, None].expand(-1, WIDTH)
    policy.verify_packed(ids, packing, cache.packed_window(0, packing))
    for hook in hooks:
        hook.remove()
    assert max(seen) == sum(NUM_ROWS)
    keys, values = cache.first_rows(0, 6, cache.capacity)
    for tensor in (*keys, *values):
        for slot, count in enumerate(NUM_ROWS):
            first = len(cache.tokens(slot))
            assert not (tensor[slot, :, first : first + count] == 0.5).all()
            assert (tensor[slot, :, first + count :] == 0.5).all()


def test_one_request_and_one_row_each_are_packed_as_well():
    policy = random_policy()
    for texts, num_rows in ((prompts(1), (3,)), (prompts(4), (1, 1, 1, 1))):
        padded, packed, *caches = both_ways(policy, texts, num_rows=num_rows, width=max(num_rows))
        torch.testing.assert_close(packed, padded, atol=TOLERANCE, rtol=0)
        assert_same_keys(*caches, len(texts))


def test_a_slot_needs_room_for_its_own_rows_and_not_for_those_of_others():
    policy = random_policy()
    texts = [(5,) * 12, (6,) * 3]
    padded_rows = 11 + 6
    padded, packed, _, _ = both_ways(policy, texts, num_rows=(2, 6), width=6, capacity=padded_rows)
    torch.testing.assert_close(packed, padded, atol=TOLERANCE, rtol=0)
    cache, _ = prefilled(policy, texts, capacity=13)
    cache.packed_window(0, Packing.of((2, 6), 6, policy.device))
    with pytest.raises(AssertionError, match="14 rows do not fit a slot of 13"):
        cache.packed_window(0, Packing.of((3, 6), 6, policy.device))
