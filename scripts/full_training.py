"""Training a causal LM to draft with all of its weights (`full` conversion).

One doubled sequence: the clean half is ordinary causal training; the mask half holds blocks of K
mask tokens, each block reading the clean tokens before it and itself in both directions. Blocks start
at a random offset, and the last clean token a block sees is the anchor of two-forward decoding.

Source: TiDAR (arXiv 2511.08923), section on training; block offset and width as decoding uses them.

Shapes: B sequences, S tokens of one half, K tokens per block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class FullLosses:
    """The two parts of the objective, in nats per scored token."""

    causal: Tensor  # scalar, next-token cross-entropy of the clean half
    draft: Tensor  # scalar, same-position cross-entropy of the mask half


def doubled_mask(length: int, block_size: int, offset: int, device: torch.device | str = "cpu") -> Tensor:
    """Attention of a doubled sequence: bool (2S, 2S), True where the row may attend the column.

    The first block's anchor is the token at `offset` (0 <= offset < block_size): mask rows at positions
    up to and including it belong to no block, are never scored, and see only themselves.
    """
    position_S = torch.arange(length, device=device)
    # Positions offset+1 .. offset+K are block 0; a block sees clean positions up to its anchor.
    block_S = torch.div(position_S - offset - 1, block_size, rounding_mode="floor")
    anchor_S = block_S * block_size + offset
    causal_SS = position_S[None, :] <= position_S[:, None]
    before_block_SS = position_S[None, :] <= anchor_S[:, None]
    same_block_SS = block_S[None, :] == block_S[:, None]
    unused_S = position_S <= offset
    alone_SS = torch.eye(length, dtype=torch.bool, device=device)
    before_block_SS = before_block_SS & ~unused_S[:, None]
    same_block_SS = torch.where(unused_S[:, None] | unused_S[None, :], alone_SS, same_block_SS)
    clean_SD = torch.cat([causal_SS, torch.zeros_like(causal_SS)], dim=1)
    masks_SD = torch.cat([before_block_SS, same_block_SS], dim=1)
    return torch.cat([clean_SD, masks_SD], dim=0)


def full_losses(
    model: nn.Module, ids_BS: Tensor, scored_BS: Tensor, *, mask_id: int, block_size: int, offset: int
) -> FullLosses:
    """Causal and draft cross-entropy of one batch of right-padded sequences.

    `scored_BS` is True where the token is a label (completion tokens, end token included).
    """
    length = ids_BS.shape[1]
    positions_S = torch.arange(length, device=ids_BS.device)
    doubled_BD = torch.cat([ids_BS, torch.full_like(ids_BS, mask_id)], dim=1)
    mask_DD = doubled_mask(length, block_size, offset, ids_BS.device)
    logits_BDV = model(
        doubled_BD,
        position_ids=torch.cat([positions_S, positions_S])[None],
        attention_mask=mask_DD[None, None],
        use_cache=False,
    ).logits.float()
    labels_BS = ids_BS.masked_fill(~scored_BS, IGNORED)
    draft_labels_BS = labels_BS.masked_fill(positions_S <= offset, IGNORED)
    causal = F.cross_entropy(
        logits_BDV[:, : length - 1].flatten(0, 1), labels_BS[:, 1:].flatten(), ignore_index=IGNORED
    )
    draft = F.cross_entropy(
        logits_BDV[:, length:].flatten(0, 1), draft_labels_BS.flatten(), ignore_index=IGNORED
    )
    return FullLosses(causal=causal, draft=draft)
