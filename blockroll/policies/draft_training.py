"""Teaching a policy to draft on texts of its own: one training pass over blocks of masks.

A block stands behind a clean token, its anchor, and sees the clean tokens up to it, and itself:

    two-forward   the anchor is the last committed token; K masks, all of them drafts
    fused         the anchor is the last accepted draft; K + 1 masks, slot 0 stands on the token that the
                  verdict will add and is not scored, slots 1..K are drafts

The teacher of a slot is the policy's own causal law at that position, detached. With an adapter the clean
rows run once without gradient and the masks attend to their keys; a `full` conversion runs both in one
doubled sequence and adds the causal loss. Where a policy to stay close to is given, its law is the teacher of
masks and causal rows alike: texts alone would be learned by heart.

Source: TiDAR (arXiv 2511.08923), training; block offset, width and layouts as decoding uses them.

Shapes: B texts, S tokens, G blocks per text, w masks per block, M = G w masks, N scored slots, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from blockroll.kernels.block_attention import AttendedRows
from blockroll.policies.hf import HFPolicy

DraftLoss = Literal["ce", "kl", "tv"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Right-padded texts of the policy's own, on its device."""

    ids_BS: Tensor  # int64
    prompt_lengths_B: Tensor  # int64; tokens behind the prompt are scored
    lengths_B: Tensor  # int64, prompt and completion
    temperature_B: Tensor  # float32, what both laws are divided by

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        temperatures: Sequence[float],
        device: torch.device,
    ) -> "Texts":
        """From token lists, one entry per text."""
        rows = [torch.tensor([*p, *c], device=device) for p, c in zip(prompts, completions, strict=True)]
        return cls(
            ids_BS=pad_sequence(rows, batch_first=True),
            prompt_lengths_B=torch.tensor([len(prompt) for prompt in prompts], device=device),
            lengths_B=torch.tensor([len(row) for row in rows], device=device),
            temperature_B=torch.tensor(temperatures, dtype=torch.float32, device=device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskBlocks:
    """Where the blocks of masks of a training pass stand."""

    anchors_BG: Tensor  # int64, index of each block's last visible token
    num_drafts: int  # K
    first_slot: int  # 0 for two-forward, 1 for fused: slots before it are not scored

    @property
    def width(self) -> int:
        """Masks of one block."""
        return self.num_drafts + self.first_slot

    @property
    def positions_BM(self) -> Tensor:
        """Absolute position of every mask, which is also the index of the token it stands on."""
        slots_w = torch.arange(self.width, device=self.anchors_BG.device)
        return (self.anchors_BG[..., None] + 1 + slots_w).flatten(1)

    def is_scored_BM(self, texts: Texts) -> Tensor:
        """Slots that are drafts and stand on a token of the completion."""
        slots_M = torch.arange(self.width, device=self.anchors_BG.device).repeat(self.anchors_BG.shape[1])
        in_text_BM = self.positions_BM < texts.lengths_B[:, None]
        return in_text_BM & (slots_M >= self.first_slot)

    def attended(self, num_tokens: int, *, num_clean: int) -> AttendedRows:
        """What clean tokens see, if they are rows, and masks."""
        return AttendedRows(make_mask=partial(self.attention_mask, num_tokens, num_clean))

    def attention_mask(self, num_tokens: int, num_clean: int, sliding_window: int | None = None) -> Tensor:
        """Bool (B, 1, num_clean + M, S + M): causal rows for clean tokens, if they are rows; then masks."""
        device = self.anchors_BG.device
        keys_S = torch.arange(num_tokens, device=device)
        anchor_BM = self.anchors_BG.repeat_interleave(self.width, dim=1)
        batch, num_masks = anchor_BM.shape
        block_M = torch.arange(num_masks, device=device) // self.width
        clean_BMS = keys_S <= anchor_BM[..., None]
        own_BMM = (block_M[:, None] == block_M).expand(batch, -1, -1)
        mask_BRK = torch.cat([clean_BMS, own_BMM], dim=2)
        rows_BR = self.positions_BM
        if num_clean:
            causal_SK = F.pad(keys_S[:, None] >= keys_S, (0, num_masks))
            mask_BRK = torch.cat([causal_SK.expand(batch, -1, -1), mask_BRK], dim=1)
            rows_BR = torch.cat([keys_S.expand(batch, -1), rows_BR], dim=1)
        if sliding_window is not None:
            keys_BK = torch.cat([keys_S.expand(batch, -1), self.positions_BM], dim=1)
            mask_BRK = mask_BRK & (rows_BR[..., None] - keys_BK[:, None] < sliding_window)
        return mask_BRK[:, None]


def random_blocks(texts: Texts, num_drafts: int, layout: str, generator: torch.Generator) -> MaskBlocks:
    """Blocks side by side over each completion, from a random offset; labels are covered about once."""
    first_slot = 1 if layout == "fused" else 0
    device, batch = texts.ids_BS.device, len(texts.ids_BS)
    completions_B = texts.lengths_B - texts.prompt_lengths_B
    num_blocks = max(1, -(-int(completions_B.max()) // num_drafts))
    offsets_B = torch.randint(num_drafts, (batch,), generator=generator).to(device)
    # Not past the end: a text shorter than its offset keeps a block at its start.
    offsets_B = torch.where(offsets_B + first_slot < completions_B, offsets_B, 0)
    starts_B = texts.prompt_lengths_B - 1 + offsets_B
    anchors_BG = starts_B[:, None] + num_drafts * torch.arange(num_blocks, device=device)
    return MaskBlocks(anchors_BG=anchors_BG, num_drafts=num_drafts, first_slot=first_slot)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftPass:
    """What one training pass gives. Sums, so that passes over parts of a batch add up."""

    loss_sum: Tensor  # scalar with gradient, nats (or total variation) over scored slots and causal tokens
    causal_sum: float  # of it, the causal loss, unweighted; 0 without one
    num_scored: int
    overlap_sum_K: Tensor  # float64, sum over blocks of sum_v min(teacher, draft) at each draft position
    count_K: Tensor  # int64, scored slots at each draft position
    tokens_sum: float  # over whole blocks: expected committed tokens of a step
    num_whole_blocks: int


def draft_pass(
    policy: HFPolicy,
    texts: Texts,
    blocks: MaskBlocks,
    *,
    loss: DraftLoss,
    causal_weight: float = 0.0,
    teacher: HFPolicy | None = None,
) -> DraftPass:
    """Loss and acceptance of one batch of texts; gradients reach the adapter, or with `causal_weight` all.

    The causal loss is the surprisal of the completions, or with a `teacher` the KL divergence from its law.
    Expected acceptance of a slot is sum_v min(teacher(v), draft(v)): what the verify rule accepts if the slot
    is reached (Leviathan et al. 2023, theorem 3.5).
    """
    num_tokens, num_masks = texts.ids_BS.shape[1], blocks.positions_BM.shape[1]
    is_full = causal_weight > 0
    if is_full:
        clean_S = torch.arange(num_tokens, device=texts.ids_BS.device).expand(len(texts.ids_BS), -1)
        hidden_BRW = policy.forward_rows(
            texts.ids_BS,
            num_masks=num_masks,
            positions_BR=torch.cat([clean_S, blocks.positions_BM], dim=1),
            rows=blocks.attended(num_tokens, num_clean=num_tokens),
            window=TextKeys(),
            num_tokens_B=texts.lengths_B,
        )
        clean_BSW, masks_BMW = hidden_BRW[:, :num_tokens], hidden_BRW[:, num_tokens:]
    else:
        with torch.no_grad():
            clean_BSW, keys = clean_pass(policy, texts.ids_BS, texts.lengths_B)
        masks_BMW = mask_pass(policy, blocks, keys, texts.lengths_B)

    is_scored_BM = blocks.is_scored_BM(texts)
    label_index_BM = blocks.positions_BM.clamp(max=num_tokens - 1)
    labels_N = texts.ids_BS.gather(1, label_index_BM)[is_scored_BM]
    teacher_BSW = clean_BSW.detach()
    if teacher is not None:
        with torch.no_grad():
            teacher_BSW, _ = clean_pass(teacher, texts.ids_BS, texts.lengths_B)
    teacher_BMW = teacher_BSW.take_along_dim((label_index_BM - 1)[..., None], dim=1)
    scale_N1 = texts.temperature_B[:, None].expand_as(is_scored_BM)[is_scored_BM][:, None]
    draft_NV = (policy.logits(masks_BMW[is_scored_BM]) / scale_N1).log_softmax(dim=-1)
    with torch.no_grad():
        teacher_NV = ((teacher or policy).logits(teacher_BMW[is_scored_BM]) / scale_N1).log_softmax(dim=-1)
    overlap_N = torch.minimum(teacher_NV.exp(), draft_NV.exp()).sum(dim=-1)
    losses_N = {
        "ce": lambda: F.nll_loss(draft_NV, labels_N, reduction="none"),
        "kl": lambda: F.kl_div(draft_NV, teacher_NV, log_target=True, reduction="none").sum(dim=-1),
        "tv": lambda: 1 - overlap_N,
    }[loss]()
    loss_sum = losses_N.sum()
    causal_sum = 0.0
    if is_full:
        causal = _causal_loss(policy, texts, clean_BSW, teacher, teacher_BSW)
        causal_sum = float(causal.detach())
        loss_sum = loss_sum + causal_weight * causal

    drafts = slice(blocks.first_slot, blocks.width)
    shape = (*blocks.anchors_BG.shape, blocks.width)
    overlap_BM = torch.zeros_like(is_scored_BM, dtype=torch.float64)
    overlap_BM[is_scored_BM] = overlap_N.detach().double()
    overlap_BGK = overlap_BM.view(shape)[..., drafts]
    is_scored_BGK = is_scored_BM.view(shape)[..., drafts]
    is_whole_BG = is_scored_BGK.all(dim=-1)
    chain_BGK = overlap_BGK.clone()
    if blocks.first_slot == 0:
        chain_BGK[..., 0] = 1.0  # a two-forward step settles its first position whatever was drafted there
    tokens_BG = 1 + chain_BGK.cumprod(dim=-1).sum(dim=-1)
    return DraftPass(
        loss_sum=loss_sum,
        causal_sum=causal_sum,
        num_scored=len(labels_N),
        overlap_sum_K=overlap_BGK.sum(dim=(0, 1)).cpu(),
        count_K=is_scored_BGK.sum(dim=(0, 1)).cpu(),
        tokens_sum=float(tokens_BG[is_whole_BG].sum()),
        num_whole_blocks=int(is_whole_BG.sum()),
    )


def clean_pass(policy: HFPolicy, ids_BS: Tensor, lengths_B: Tensor) -> tuple[Tensor, "TextKeys"]:
    """Causal states (B, S, W) of right-padded texts, and their keys and values for `mask_pass`."""
    clean_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand(len(ids_BS), -1)
    keys = TextKeys()
    hidden_BSW = policy.forward_rows(
        ids_BS,
        num_masks=0,
        positions_BR=clean_BS,
        rows=AttendedRows(make_mask=partial(_causal_mask, clean_BS)),
        window=keys,
        num_tokens_B=lengths_B,
    )
    return hidden_BSW, keys


def mask_pass(policy: HFPolicy, blocks: MaskBlocks, keys: "TextKeys", lengths_B: Tensor) -> Tensor:
    """States (B, M, W) of blocks of masks behind the clean rows of `clean_pass`."""
    anchors_BG = blocks.anchors_BG
    num_tokens = keys.layers[0][0].shape[2]
    return policy.forward_rows(
        torch.empty((len(anchors_BG), 0), dtype=torch.int64, device=anchors_BG.device),
        num_masks=blocks.positions_BM.shape[1],
        # As in decoding: rows past the context must not stretch a scaled rotary embedding.
        positions_BR=blocks.positions_BM.clamp(max=policy.max_length - 1),
        rows=blocks.attended(num_tokens, num_clean=0),
        window=TextKeys(keys.layers),
        num_tokens_B=lengths_B,
    )


class TextKeys:
    """Keys and values of one pass, behind those of clean rows from an earlier one; nothing is cached."""

    states = None
    pages = None

    def __init__(self, before: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        self.before = before
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.lengths_B = torch.zeros(0)
        self.extent = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """All keys and values of the layer, the earlier ones first."""
        if self.before:
            key, value = self.before[layer_idx]
            key_states = torch.cat([key, key_states], dim=2)
            value_states = torch.cat([value, value_states], dim=2)
        self.layers.append((key_states, value_states))
        return key_states, value_states


def _causal_mask(positions_BS: Tensor, sliding_window: int | None) -> Tensor:
    distance_BSS = positions_BS[:, :, None] - positions_BS[:, None]
    mask_BSS = distance_BSS >= 0
    if sliding_window is not None:
        mask_BSS = mask_BSS & (distance_BSS < sliding_window)
    return mask_BSS[:, None]


def _causal_loss(
    policy: HFPolicy, texts: Texts, clean_BSW: Tensor, teacher: HFPolicy | None, teacher_BSW: Tensor
) -> Tensor:
    """At the completions' tokens, summed, at their temperature: their surprisal, or KL from the teacher.

    At another temperature than the one that drew them, surprisal would pull to a flatter or sharper law.
    """
    index_S = torch.arange(1, texts.ids_BS.shape[1], device=texts.ids_BS.device)
    is_label_BS = (index_S >= texts.prompt_lengths_B[:, None]) & (index_S < texts.lengths_B[:, None])
    scale_N1 = texts.temperature_B[:, None].expand_as(is_label_BS)[is_label_BS][:, None]
    law_NV = (policy.logits(clean_BSW[:, :-1][is_label_BS]) / scale_N1).log_softmax(dim=-1)
    if teacher is None:
        return F.nll_loss(law_NV, texts.ids_BS[:, 1:][is_label_BS], reduction="sum")
    with torch.no_grad():
        want_NV = (teacher.logits(teacher_BSW[:, :-1][is_label_BS]) / scale_N1).log_softmax(dim=-1)
    return F.kl_div(law_NV, want_NV, log_target=True, reduction="sum")
