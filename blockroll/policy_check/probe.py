"""Random prompts that go through one real policy and one real cache, and the gaps that are measured on them.

It knows what a policy's forwards need and how far equal ones may lie apart; which forwards must be equal is
the business of `policy_check`. Whatever it changes on a policy is put back, bit for bit.

Shapes: B prompts, R rows, K drafted tokens, L = K + 1 rows of a block (an anchor and its drafts), S blocks,
W hidden width, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from blockroll.errors import InvalidInput
from blockroll.policies.adapter import DraftAdapter
from blockroll.policies.hf import HFPolicy
from blockroll.policies.rounding import nudged_inputs
from blockroll.rollout.engine.cache.contract import Cache
from blockroll.rollout.engine.cache.layouts import open_slots

LONGEST_WINDOW = 256  # sliding windows up to this are filled; beyond, prompts would cost too much
MOST_PROMPTS = 6  # of those given
LONGEST_PREFIX = 12  # cached tokens of the longest prompt, where no window asks for more
ROUNDING_MARGIN = 3  # times a model's own rounding, where that is more than the bound of its dtype
LIKELY = 1e-3  # below float32 the logits of rare tokens round coarsely: only tokens above this are compared


@dataclass(frozen=True, kw_only=True)  # without slots, for what is computed once
class PolicyProbe:
    """Random prompts of mixed length, and two blocks of tokens to decode behind each."""

    policy: HFPolicy
    num_drafts: int
    prefixes: tuple[tuple[int, ...], ...]  # what lies in the cache; the first is empty
    blocks_SBL: Tensor  # int64; the second block follows what the first one commits
    window: int | None  # of the model's sliding layers

    @property
    def width(self) -> int:
        """L."""
        return self.num_drafts + 1

    @property
    def block_BL(self) -> Tensor:
        """The first block."""
        return self.blocks_SBL[0]

    @property
    def logprob_bound(self) -> float:
        """How far equal log-probabilities may lie apart: no test can see below the model's own rounding."""
        return self.at_least_rounding(1e-4 if self.is_float32 else 0.25)

    def at_least_rounding(self, bound: float) -> float:
        """The bound, or a few times what rounding alone does if that is more (and finite)."""
        floor = ROUNDING_MARGIN * self.rounding
        return max(bound, floor) if math.isfinite(floor) else bound

    @property
    def cache_bound(self) -> float:
        """Of keys and values, as a share of the layer's largest."""
        return 1e-4 if self.is_float32 else 0.1

    @property
    def is_float32(self) -> bool:
        """Whether the weights round as finely as float32 or finer."""
        return torch.finfo(self.policy.model.dtype).bits >= 32

    @property
    def dtype_name(self) -> str:
        """Of the weights."""
        return str(self.policy.model.dtype).removeprefix("torch.")

    @property
    def is_window_reached(self) -> bool:
        """Whether some row does not see all of its prefix; true without a window."""
        return self.window is None or max(map(len, self.prefixes)) > self.window

    def empty_cache(self, num_slots: int) -> Cache:
        """Room for the longest prompt, two blocks and the widest fused forward."""
        longest = max(map(len, self.prefixes))
        capacity = longest + 2 * self.width + self.width * (self.width + 1)
        return open_slots(self.policy, num_slots=num_slots, capacity=capacity)

    def prefilled(self, prefixes: Sequence[Sequence[int]] | None = None) -> Cache:
        """A cache that holds these prefixes, by default the probe's own."""
        prefixes = self.prefixes if prefixes is None else prefixes
        cache = self.empty_cache(len(prefixes))
        self.extend(cache, prefixes)
        return cache

    def extend(self, cache: Cache, pieces: Sequence[Sequence[int]]) -> None:
        """Prefill and commit one more piece of text per slot."""
        lengths = [len(piece) for piece in pieces]
        ids_BR = torch.zeros((len(pieces), max(1, *lengths)), dtype=torch.int64)
        for row, piece in enumerate(pieces):
            ids_BR[row, : len(piece)] = torch.tensor(piece, dtype=torch.int64)
        window = cache.window(0, len(pieces), ids_BR.shape[1])
        self.policy.prefill(ids_BR.to(self.policy.device), window)
        cache.commit(0, pieces)

    def verify(self, cache: Cache, block_BL: Tensor) -> Tensor:
        """Verify logits (B, L, V) behind all slots."""
        return self.policy.verify_logits(block_BL, cache.window(0, *block_BL.shape))

    def draft(self, cache: Cache, anchors_B: Tensor, num_drafts: int) -> Tensor:
        """Logits (B, K + 1, V) of a draft forward behind all slots: the anchor's row and K masks'."""
        window = cache.window(0, len(anchors_B), num_drafts + 1)
        return self.policy.draft_logits(anchors_B[:, None], num_drafts, window)

    def draft_whole_texts(self, num_drafts: int) -> Tensor:
        """The same of prefixes and their anchors in one forward: texts of all lengths end in one column."""
        texts = [[*prefix, anchor] for prefix, anchor in zip(self.prefixes, self.block_BL[:, 0], strict=True)]
        longest = max(map(len, texts))
        ids_BC = torch.zeros((len(texts), longest), dtype=torch.int64)
        for row, text in enumerate(texts):
            ids_BC[row, longest - len(text) :] = torch.tensor(text, dtype=torch.int64)
        cache = self.empty_cache(len(texts))
        cache.share(0, [0] * len(texts), [len(text) - longest for text in texts])
        window = cache.window(0, len(texts), longest + num_drafts)
        return self.policy.draft_logits(ids_BC.to(self.policy.device), num_drafts, window)

    @cached_property
    def stock_logits_BLV(self) -> Tensor:
        """Of the first block, by the model's own forward over each whole text, without a cache."""
        model, rows = self.policy.model, []
        with _stock_attention(self.policy):
            for prefix, block_L in zip(self.prefixes, self.block_BL, strict=True):
                ids_R = torch.cat([torch.tensor(prefix, dtype=torch.int64, device=block_L.device), block_L])
                output = model(input_ids=ids_R[None], use_cache=False, logits_to_keep=self.width)
                rows.append(output.logits[0].float())
        return torch.stack(rows)

    @cached_property
    def rounding(self) -> float:
        """How far the stock forward's log-probabilities move when every input moves by its last bit.

        From there on every sum rounds differently, as it does in another kernel or at another shape.
        """
        with nudged_inputs(self.policy.model, self.policy.kv_shape.dtype):
            nudged = replace(self).stock_logits_BLV  # a copy that has computed nothing yet
        return self.logprob_gap(nudged, self.stock_logits_BLV)

    def logprob_gap(self, logits: Tensor, reference: Tensor) -> float:
        """Largest difference of log-probabilities; below float32 over likely tokens only."""
        reference = reference.log_softmax(dim=-1)
        gaps = (logits.log_softmax(dim=-1) - reference).abs()
        if not self.is_float32:
            gaps = gaps[~(reference <= math.log(LIKELY))]  # NaN stays
        return float(gaps.max())


def make_probe(
    policy: HFPolicy, *, num_drafts: int, seed: int, prompts: Sequence[Sequence[int]] = ()
) -> PolicyProbe:
    """Equal arguments give equal probes. InvalidInput: K is below 1, or the context is too short."""
    if num_drafts < 1:
        raise InvalidInput(f"num_drafts must be at least 1, got {num_drafts}")
    width = num_drafts + 1
    context = min((policy.max_length, *policy.length_boundaries))
    room = context - 2 * width - 1
    if room < 1:
        raise InvalidInput(
            f"blocks of {num_drafts} drafts do not fit a context of {context} positions; "
            "check with a smaller num_drafts"
        )
    generator = torch.Generator().manual_seed(seed)
    tokens_T = torch.tensor(_plain_tokens(policy))

    def draw(*shape: int) -> Tensor:
        return tokens_T[torch.randint(len(tokens_T), shape, generator=generator)]

    window = _sliding_window(policy)
    if prompts:
        prefixes = _spread(prompts, room)
    else:
        lengths = _lengths(window, width, room)
        prefixes = tuple(tuple(draw(max(0, length)).tolist()) for length in lengths)
    return PolicyProbe(
        policy=policy,
        num_drafts=num_drafts,
        prefixes=prefixes,
        blocks_SBL=draw(2, len(prefixes), width).to(policy.device),
        window=window,
    )


def _spread(prompts: Sequence[Sequence[int]], room: int) -> tuple[tuple[int, ...], ...]:
    """The shortest, the longest and those between at equal steps of rank."""
    ranked = sorted((tuple(prompt) for prompt in prompts), key=len)
    if len(ranked[-1]) > room:
        raise InvalidInput(
            f"the longest prompt has {len(ranked[-1])} tokens, and the context has room for {room} before "
            "the two blocks that are checked behind it; leave it out or cut it"
        )
    steps = min(MOST_PROMPTS, len(ranked)) - 1
    between = (ranked[round(step * (len(ranked) - 1) / steps)] for step in range(steps))
    return (*between, ranked[-1])


def _lengths(window: int | None, width: int, room: int) -> tuple[int, ...]:
    """Of random prompts. One ends just below a window that is reached, so that its block crosses the edge."""
    longest = min(room, LONGEST_PREFIX)
    if window is not None and window <= LONGEST_WINDOW:
        longest = min(room, max(longest, window + width + 3))
    return (0, 1, longest // 2, longest - width - 4, longest - 1, longest)


def _plain_tokens(policy: HFPolicy) -> list[int]:
    """Token ids that mean nothing special."""
    known = min(policy.vocab_size, num_tokens(policy) or policy.vocab_size)
    special = {*policy.eos_token_ids, policy.mask_token_id, policy.model.config.pad_token_id}
    return [token_id for token_id in range(known) if token_id not in special]


def num_tokens(policy: HFPolicy) -> int | None:
    """Of the tokenizer, added ones included; None without one."""
    return None if policy.tokenizer is None else len(policy.tokenizer)


def _sliding_window(policy: HFPolicy) -> int | None:
    """As the model's config has it: the policy's own masks are what is on trial."""
    config = policy.model.config
    kinds = getattr(config, "layer_types", None) or ("sliding_attention",)
    return getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None


def cache_gap(cache: Cache, recomputed: Cache) -> float:
    """Largest difference of committed keys, values and states, as a share of the largest in that layer."""
    gaps = []
    for slot in range(cache.num_slots):
        for mine, other in zip(cache.committed(slot), recomputed.committed(slot), strict=True):
            assert mine.shape == other.shape, f"{tuple(mine.shape)} committed, not {tuple(other.shape)}"
            if other.numel():
                scale = other.float().abs().max().clamp(min=1e-6)
                gaps.append((mine.float() - other.float()).abs().max() / scale)
    return float(torch.stack(gaps).max())


@contextmanager
def _stock_attention(policy: HFPolicy) -> Iterator[None]:
    """The model on transformers' own attention inside this block."""
    name = policy.model.config._attn_implementation
    policy.model.set_attn_implementation(policy.stock_attention)
    try:
        yield
    finally:
        policy.model.set_attn_implementation(name)


def other_masks(policy: HFPolicy) -> AbstractContextManager[None]:
    """Mask rows that hold something else inside a `with` block; no weight of the model is touched."""
    if policy.adapter is not None:
        return _other_adapter(policy.adapter)
    assert policy.mask_token_id is not None, "a policy without masks has no other masks"
    return _other_mask_token(policy.model.get_input_embeddings(), policy.mask_token_id)


@contextmanager
def _other_adapter(adapter: DraftAdapter) -> Iterator[None]:
    kept = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    try:
        adapter.load_state_dict({name: _other(tensor) for name, tensor in kept.items()})
        yield
    finally:
        adapter.load_state_dict(kept)


@contextmanager
def _other_mask_token(embedding: nn.Module, mask_token_id: int) -> Iterator[None]:
    def change_masks(module: nn.Module, inputs: tuple[Tensor, ...], embeddings_BRW: Tensor) -> Tensor:
        is_mask_BR = inputs[0].eq(mask_token_id)
        return torch.where(is_mask_BR[..., None], _other(embeddings_BRW), embeddings_BRW)

    handle = embedding.register_forward_hook(change_masks)
    try:
        yield
    finally:
        handle.remove()


def _other(values: Tensor) -> Tensor:
    """Different everywhere, zeros too, and of like size: unseen values must stay finite."""
    return 0.01 - 2 * values
