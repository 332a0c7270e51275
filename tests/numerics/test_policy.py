"""The policy's three forwards against transformers' plain causal forward, in float32.

Bits are compared where both sides run the same kernels on the same shapes: what mask rows leave behind must
not move one bit of a verify row.
"""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.cache.slots import SlotCache
from blockroll.types import Plan, Request, Sampling
from tests.engines import make_requests, run
from tests.models import FAMILIES, MASK_ID, VOCAB_SIZE, prompts, random_policy

NUM_DRAFTS = 4
TOLERANCE = 1e-4


@pytest.fixture(params=FAMILIES)
def policy(request):
    return random_policy(request.param)


def prefilled(policy, texts, *, capacity=64):
    """A cache that holds everything of the texts but their last tokens, and those (the anchors)."""
    cache = SlotCache(policy, num_slots=len(texts), capacity=capacity)
    longest = max(len(text) - 1 for text in texts)
    ids = torch.zeros(len(texts), max(longest, 1), dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text) - 1] = torch.tensor(text[:-1], dtype=torch.int64)
    policy.prefill(ids, cache.window(0, len(texts), ids.shape[1]))
    cache.commit(0, [text[:-1] for text in texts])
    return cache, torch.tensor([text[-1] for text in texts])


def plain_logits(policy, ids):
    """transformers' own forward, stock attention."""
    policy.model.set_attn_implementation(policy.stock_attention)
    with torch.no_grad():
        logits = policy.model(torch.tensor([ids]), use_cache=False).logits[0]
    policy.model.set_attn_implementation("blockroll")
    return logits


def random_drafts(rows, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB_SIZE, (rows, NUM_DRAFTS), generator=generator)


@pytest.mark.failure(89)
def test_verify_logits_equal_the_plain_causal_forward(policy):
    texts = prompts(6)
    cache, anchors = prefilled(policy, texts)
    drafts = random_drafts(len(texts))
    window = cache.window(0, len(texts), NUM_DRAFTS + 1)
    got = policy.verify_logits(torch.cat([anchors[:, None], drafts], dim=1), window)
    for row, text in enumerate(texts):
        want = plain_logits(policy, [*text, *drafts[row].tolist()])[len(text) - 1 :]
        torch.testing.assert_close(got[row], want, atol=TOLERANCE, rtol=0)


def test_under_autocast_keys_are_kept_in_its_precision_and_logits_are_the_models(policy):
    """As a trainer with bf16=True computes; its weights stay float32."""
    texts, drafts = prompts(6), random_drafts(6)
    with torch.autocast("cpu", torch.bfloat16):
        cache, anchors = prefilled(policy, texts)
        window = cache.window(0, len(texts), NUM_DRAFTS + 1)
        got = policy.verify_logits(torch.cat([anchors[:, None], drafts], dim=1), window)
        rows = [[*text, *drafts[row].tolist()] for row, text in enumerate(texts)]
        want = [plain_logits(policy, ids)[-NUM_DRAFTS - 1 :] for ids in rows]
    exact = torch.stack([plain_logits(policy, ids)[-NUM_DRAFTS - 1 :] for ids in rows])
    rounding = (torch.stack(want).float() - exact).abs().max()
    assert {keys.dtype for keys in (*cache._keys, *cache._values)} == {torch.bfloat16}
    assert (got - exact).abs().max() < 2 * rounding


def test_an_engine_may_go_in_and_out_of_autocast_between_requests(policy):
    engine = Engine(policy, plan=Plan(NUM_DRAFTS))
    for index, is_on in enumerate((True, False, True)):
        request = Request(
            request_id=f"r{index}", prompt_ids=(5, 6, 7), seed=0, sampling=Sampling(max_tokens=8)
        )
        engine.submit([request])
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            while engine.num_requests:
                for rollout in engine.step().finished:
                    assert rollout.error is None
        assert engine._cache._keys[0].dtype == (torch.bfloat16 if is_on else torch.float32)


class Casts(TorchDispatchMode):
    """Counts, by its address, how often a weight is copied to another precision."""

    def __init__(self, model):
        super().__init__()
        self.counts = dict.fromkeys((each.data_ptr() for each in model.parameters()), 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.counts:
            self.counts[args[0].data_ptr()] += 1
        return function(*args, **(kwargs or {}))


def test_autocast_casts_every_weight_once_and_not_in_every_forward(policy):
    requests = make_requests(prompts(4), Sampling(max_tokens=12))
    with torch.autocast("cpu", torch.bfloat16), Casts(policy.model) as casts:
        run(policy, requests, Plan(NUM_DRAFTS))
    assert max(casts.counts.values()) == 1


def dense_logits(policy, ids, sees, positions):
    """transformers' stock attention over a whole text, under a mask of ours."""

    def within(window):
        near = positions[:, None] - positions[None] < window if window else True
        return (sees & near)[None, None]

    config = policy.model.config
    window = getattr(config, "sliding_window", None)
    mask = within(window)
    if policy._layer_types:
        mask = {"full_attention": within(None), "sliding_attention": within(window)}
    if policy.stock_attention == "eager":  # which adds its mask

        def additive(allowed):
            return torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)

        mask = {kind: additive(m) for kind, m in mask.items()} if isinstance(mask, dict) else additive(mask)
    policy.model.set_attn_implementation(policy.stock_attention)
    with torch.no_grad():
        logits = policy.model(
            torch.tensor([ids]), attention_mask=mask, position_ids=positions[None], use_cache=False
        ).logits[0]
    policy.model.set_attn_implementation("blockroll")
    return logits


def test_draft_logits_equal_a_dense_forward_with_the_block_mask(policy):
    texts = prompts(5)
    cache, anchors = prefilled(policy, texts)
    got = policy.draft_logits(anchors[:, None], NUM_DRAFTS, cache.window(0, len(texts), NUM_DRAFTS + 1))
    for row, text in enumerate(texts):
        ids = [*text, *[MASK_ID] * NUM_DRAFTS]
        sees = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        sees[len(text) :] = True
        want = dense_logits(policy, ids, sees, torch.arange(len(ids)))[len(text) - 1 :]
        torch.testing.assert_close(got[row], want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("stale", [0.0, 1e4])
def test_draft_logits_of_whole_texts_equal_those_behind_their_cached_rows(policy, stale):
    """Texts of many lengths end in one column; what stands before the short ones reaches nobody."""
    texts = prompts(6, longest=14)
    longest = max(map(len, texts))
    cache, anchors = prefilled(policy, texts)
    want = policy.draft_logits(anchors[:, None], NUM_DRAFTS, cache.window(0, len(texts), NUM_DRAFTS + 1))
    whole = SlotCache(policy, num_slots=len(texts), capacity=64)
    whole.window(0, 1, 1)
    whole.fill_stale(stale)
    ids = torch.tensor([[*[7] * (longest - len(text)), *text] for text in texts])
    whole.share(0, [0] * len(texts), [len(text) - longest for text in texts])
    got = policy.draft_logits(ids, NUM_DRAFTS, whole.window(0, len(texts), longest + NUM_DRAFTS))
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
    whole.commit(0, texts)
    cache.commit(0, anchors[:, None].tolist())
    for row in range(len(texts)):
        for mine, other in zip(whole.committed(row), cache.committed(row), strict=True):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


LEVELS = [(0,), (0, NUM_DRAFTS), (0, 2), tuple(range(NUM_DRAFTS + 1))]


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_a_fused_forward_verifies_as_a_causal_one_and_proposes_as_a_fresh_one_would(policy, levels):
    """The proposal of level n is what a forward of its own gives after n accepted drafts, for every n."""
    texts = prompts(5)
    drafts = random_drafts(len(texts))
    cache, anchors = prefilled(policy, texts)
    ids = torch.cat([anchors[:, None], drafts], dim=1)
    rows = policy.fused_rows(ids, levels, cache.window(0, len(texts), (NUM_DRAFTS + 1) * (len(levels) + 1)))
    for row, text in enumerate(texts):
        want = plain_logits(policy, [*text, *drafts[row].tolist()])[len(text) - 1 :]
        torch.testing.assert_close(rows.verify_logits_BLV[row], want, atol=TOLERANCE, rtol=0)
        for index, level in enumerate(levels):
            known = [*text, *drafts[row, :level].tolist()]
            whole = [*known, *[MASK_ID] * (NUM_DRAFTS + 1)]
            sees = torch.ones(len(whole), len(whole), dtype=torch.bool).tril()
            sees[len(known) :] = True
            want = dense_logits(policy, whole, sees, torch.arange(len(whole)))[len(known) :]
            got = policy.proposal_logits(rows.proposal_states_BPLW[row : row + 1, index])[0]
            torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


def test_drafts_look_both_ways_and_the_anchor_does_not(policy):
    """A causal draft mask, or an anchor that sees masks, would pass the law tests and lose acceptance."""
    texts = prompts(3)
    cache, anchors = prefilled(policy, texts)
    policy.draft_logits(anchors[:, None], NUM_DRAFTS, cache.window(0, 3, NUM_DRAFTS + 1))
    keys_with_masks = [cache._keys[-1][row, :, len(text) - 1].clone() for row, text in enumerate(texts)]
    policy.verify_logits(anchors[:, None], cache.window(0, 3, 1))
    for row, text in enumerate(texts):
        torch.testing.assert_close(
            cache._keys[-1][row, :, len(text) - 1], keys_with_masks[row], atol=1e-5, rtol=0
        )
    wide = policy.draft_logits(anchors[:, None], NUM_DRAFTS, cache.window(0, 3, NUM_DRAFTS + 1))
    narrow = policy.draft_logits(anchors[:, None], NUM_DRAFTS - 1, cache.window(0, 3, NUM_DRAFTS))
    assert (wide[:, 1] - narrow[:, 1]).abs().max() > 1e-3


@pytest.mark.failure(92)
@pytest.mark.parametrize("poison", [1e4, -1e4])
def test_verify_logits_are_bit_identical_whatever_mask_rows_left_behind(policy, poison):
    texts = prompts(6)
    drafts = random_drafts(len(texts))
    results = []
    for value in (0.0, poison):
        cache, anchors = prefilled(policy, texts)
        policy.draft_logits(anchors[:, None], NUM_DRAFTS, cache.window(0, len(texts), NUM_DRAFTS + 1))
        cache.fill_stale(value)
        ids = torch.cat([anchors[:, None], drafts], dim=1)
        results.append(policy.verify_logits(ids, cache.window(0, len(texts), NUM_DRAFTS + 1)))
    assert torch.equal(*results)


def test_verify_logits_are_bit_identical_whatever_the_mask_embedding_holds(policy):
    texts = prompts(6)
    drafts = random_drafts(len(texts))
    results, draft_logits = [], []
    for scale in (1.0, -50.0):
        with torch.no_grad():
            policy.model.get_input_embeddings().weight[MASK_ID] *= scale
        cache, anchors = prefilled(policy, texts)
        draft_logits.append(
            policy.draft_logits(anchors[:, None], NUM_DRAFTS, cache.window(0, len(texts), NUM_DRAFTS + 1))
        )
        ids = torch.cat([anchors[:, None], drafts], dim=1)
        results.append(policy.verify_logits(ids, cache.window(0, len(texts), NUM_DRAFTS + 1)))
    assert torch.equal(*results)
    assert not torch.equal(*(logits[:, 1:] for logits in draft_logits))
    first, second = (logits[:, 0] for logits in draft_logits)  # the anchor sees no mask
    if policy.model.config.model_type == "qwen3_moe":  # the sizes of its groups of tokens change
        torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    else:
        assert torch.equal(first, second)


@pytest.mark.failure(46)
def test_cache_after_every_pattern_of_accepts_equals_recompute(policy):
    """Two steps; in each, every row of a batch accepts another number of drafts."""
    patterns = list(itertools.product(range(NUM_DRAFTS + 1), repeat=2))
    texts = [list(text) for text in prompts(len(patterns), longest=9)]
    cache, anchors = prefilled(policy, texts)
    for step in range(2):
        drafts = random_drafts(len(texts), seed=step)
        policy.draft_logits(anchors[:, None], NUM_DRAFTS, cache.window(0, len(texts), NUM_DRAFTS + 1))
        ids = torch.cat([anchors[:, None], drafts], dim=1)
        policy.verify_logits(ids, cache.window(0, len(texts), NUM_DRAFTS + 1))
        accepted = torch.tensor([pattern[step] for pattern in patterns])
        cache.commit(0, [row[: n + 1] for row, n in zip(ids.tolist(), accepted.tolist(), strict=True)])
        anchors = torch.randint(
            4, VOCAB_SIZE, (len(texts),), generator=torch.Generator().manual_seed(step + 9)
        )
        for row, text in enumerate(texts):
            text += [*drafts[row, : accepted[row]].tolist(), int(anchors[row])]
    fresh, _ = prefilled(policy, [tuple(text) for text in texts])
    assert [cache.tokens(slot) for slot in range(len(texts))] == [text[:-1] for text in texts]
    for mine, recomputed in zip((*cache._keys, *cache._values), (*fresh._keys, *fresh._values), strict=True):
        for row, length in enumerate(fresh.lengths(0, len(texts))):
            torch.testing.assert_close(
                mine[row, :, :length], recomputed[row, :, :length], atol=1e-4, rtol=1e-4
            )


def test_a_batch_row_gets_the_logits_it_gets_alone(policy):
    texts = prompts(6)
    cache, anchors = prefilled(policy, texts)
    together = policy.verify_logits(anchors[:, None], cache.window(0, len(texts), 1))
    for row, text in enumerate(texts):
        alone, anchor = prefilled(policy, [text])
        torch.testing.assert_close(
            together[row],
            policy.verify_logits(anchor[:, None], alone.window(0, 1, 1))[0],
            atol=TOLERANCE,
            rtol=0,
        )
