"""The definition of `block_attention`, and attention under a mask, which is how it runs on a CPU.

Shapes: B requests, H query heads, G key heads, R rows, L clean rows, S keys, D head width; N pages, Z rows of
a page, T pages of the longest request; N rows where rows are packed.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from blockroll.kernels.block_attention.layout import RowLayout
from blockroll.kernels.block_attention.packing import Packing
from blockroll.kernels.block_attention.rows import AttendedRows
from blockroll.kernels.pages import Pages


def paged_attention(
    query_BHRD: Tensor,
    key_BGRD: Tensor,
    value_BGRD: Tensor,
    pages: Pages,
    layout: RowLayout,
    lengths_B: Tensor,
    scaling: float | None,
    softcap: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Softmax over the keys that each row sees, in float64, segment by segment: (B, R, H, D).

    A segment reads the prefix, the clean rows up to its level and its own, and nothing else: whatever other
    blocks, stale rows and pages behind a text hold, it is the same bit for bit. Rows before a text's first
    token are zeros, and no row sees them.
    """
    positions_BR = layout.positions(lengths_B)
    is_text_BR = lengths_B[:, None] + layout.offsets(lengths_B.device) >= 0
    new = [_texts(each.double(), is_text_BR) for each in (key_BGRD, value_BGRD)]
    prefix = [_prefix(held, pages.table_BT, lengths_B) for held in (pages.keys_NGZD, pages.values_NGZD)]
    index_S = torch.arange(prefix[0].shape[2], device=lengths_B.device)
    is_prefix_BS = index_S < lengths_B[:, None]
    clean = slice(0, layout.num_clean)
    segments = [(clean, clean)] if layout.num_clean else []
    for block, level in enumerate(layout.levels):
        first = layout.num_clean + block * layout.width
        segments.append((slice(0, level + 1), slice(first, first + layout.width)))
    outputs = []
    for seen, own in segments:
        is_block = own != clean
        places = [seen, own] if is_block else [own]
        keys_BGSD, values_BGSD = (
            torch.cat([held, *(rows[:, :, place] for place in places)], dim=2)
            for held, rows in zip(prefix, new, strict=True)
        )
        new_BM = torch.cat([positions_BR[:, place] for place in places], dim=1)
        key_position_BS = torch.cat([index_S.expand(len(lengths_B), -1), new_BM], dim=1)
        row_position_BR1 = positions_BR[:, own, None]
        is_text_BM = torch.cat([is_text_BR[:, place] for place in places], dim=1)
        sees_new_BRM = is_text_BM[:, None].expand(-1, row_position_BR1.shape[1], -1)
        if not is_block:
            sees_new_BRM = sees_new_BRM.tril()
        prefix_BRS = is_prefix_BS[:, None].expand(-1, sees_new_BRM.shape[1], -1)
        sees_BRS = torch.cat([prefix_BRS, sees_new_BRM], dim=2)
        if sliding_window is not None:
            sees_BRS = sees_BRS & (row_position_BR1 - key_position_BS[:, None] < sliding_window)
        query_BHMD = query_BHRD[:, :, own].double()
        outputs.append(_attended(query_BHMD, keys_BGSD, values_BGSD, sees_BRS, scaling, softcap))
    return torch.cat(outputs, dim=2).transpose(1, 2).to(query_BHRD.dtype).contiguous()


def _prefix(held_NGZD: Tensor, table_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """Rows (B, G, T * Z, D) of the pages of each request; zeros behind its prefix, whatever lies there."""
    rows_BGSD = held_NGZD[table_BT].transpose(1, 2).flatten(2, 3).double()
    return _texts(rows_BGSD, torch.arange(rows_BGSD.shape[2], device=lengths_B.device) < lengths_B[:, None])


def _texts(rows_BGSD: Tensor, is_text_BS: Tensor) -> Tensor:
    """Zeros in place of rows that are no text's, whatever these hold."""
    return torch.where(is_text_BS[:, None, :, None], rows_BGSD, 0)


def _attended(
    query_BHRD: Tensor,
    keys_BGSD: Tensor,
    values_BGSD: Tensor,
    sees_BRS: Tensor,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """The formula, (B, H, R, D); zeros where a row sees nothing."""
    repeats = query_BHRD.shape[1] // keys_BGSD.shape[1]
    keys_BHSD, values_BHSD = (each.repeat_interleave(repeats, dim=1) for each in (keys_BGSD, values_BGSD))
    scale = query_BHRD.shape[-1] ** -0.5 if scaling is None else scaling
    scores_BHRS = query_BHRD @ keys_BHSD.transpose(2, 3) * scale
    if softcap is not None:
        scores_BHRS = softcap * torch.tanh(scores_BHRS / softcap)
    weights_BHRS = scores_BHRS.masked_fill(~sees_BRS[:, None], -torch.inf).softmax(dim=-1)
    return weights_BHRS.masked_fill(~sees_BRS.any(dim=-1)[:, None, :, None], 0) @ values_BHSD


def packed_attention(
    query_1HND: Tensor,
    key_1GND: Tensor,
    value_1GND: Tensor,
    pages: Pages,
    layout: RowLayout,
    lengths_B: Tensor,
    packing: Packing,
    scaling: float | None,
    softcap: float | None,
    sliding_window: int | None,
) -> Tensor:
    """The same of packed rows, (1, N, H, D): those that the rectangle would have."""
    offsets_L = torch.arange(layout.num_rows, device=lengths_B.device)
    row_BL = packing.starts_B[:, None] + torch.minimum(offsets_L, packing.num_rows_B[:, None] - 1)
    query, key, value = (each[0][:, row_BL].transpose(0, 1) for each in (query_1HND, key_1GND, value_1GND))
    given = (query, key, value, pages, layout, lengths_B, scaling, softcap, sliding_window)
    return packing.pack(paged_attention(*given))


def banded_attention(
    query_1HND: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    rows: AttendedRows,
    sliding_window: int | None,
    scaling: float | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Packed rows over a window, (1, N, H, D): of all requests the first, then of some those behind them."""
    assert rows.packing is not None
    masks = rows.band_masks(sliding_window, query_1HND.shape[1] // key_BGSD.shape[1])
    queries = rows.packing.by_band(query_1HND.transpose(1, 2))
    outputs = [
        masked_attention(
            query_BLHD.transpose(1, 2),
            band.of(key_BGSD),
            band.of(value_BGSD),
            mask,
            scaling=scaling,
            softcap=softcap,
            dropout=dropout,
        )
        for band, query_BLHD, mask in zip(rows.packing.bands, queries, masks, strict=True)
    ]
    return rows.packing.from_bands(outputs)


def masked_attention(
    query_BHRD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None,
    softcap: float | None,
    dropout: float = 0.0,
) -> Tensor:
    """Under a boolean mask (B, 1, R, S) or a folded one (B, 1, H / G * R, S): (B, R, H, D).

    None: the last rows of a text, each seeing what is before it.
    """
    rows = query_BHRD.shape[2]
    if softcap is not None:
        plain_mask = None if mask is None else mask[:, :, :rows]
        return _capped_attention(query_BHRD, key_BGSD, value_BGSD, plain_mask, scaling, softcap)
    repeats = query_BHRD.shape[1] // key_BGSD.shape[1]
    if repeats > 1 and mask is not None:
        # Query heads of one group become rows of one head: its keys and values are read once.
        folded = scaled_dot_product_attention(
            query_BHRD.reshape(len(query_BHRD), key_BGSD.shape[1], repeats * rows, -1),
            key_BGSD,
            value_BGSD,
            attn_mask=mask if mask.shape[2] in (1, repeats * rows) else mask.repeat(1, 1, repeats, 1),
            dropout_p=dropout,
            scale=scaling,
        )
        return folded.reshape(query_BHRD.shape).transpose(1, 2).contiguous()
    output_BHRD = scaled_dot_product_attention(
        query_BHRD,
        key_BGSD,
        value_BGSD,
        attn_mask=mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=mask is None and rows > 1,
        enable_gqa=repeats > 1,
    )
    return output_BHRD.transpose(1, 2).contiguous()


def _capped_attention(
    query_BHRD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    mask_B1RS: Tensor | None,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """In plain torch, because its fused attention has no soft cap; softmax in float32."""
    rows, repeats = query_BHRD.shape[2], query_BHRD.shape[1] // key_BGSD.shape[1]
    key_BHSD = key_BGSD.repeat_interleave(repeats, dim=1)
    value_BHSD = value_BGSD.repeat_interleave(repeats, dim=1)
    scale = query_BHRD.shape[-1] ** -0.5 if scaling is None else scaling
    scores_BHRS = torch.tanh(query_BHRD @ key_BHSD.transpose(2, 3) * scale / softcap) * softcap
    if mask_B1RS is None:
        keys = key_BHSD.shape[2]
        mask_B1RS = torch.ones((rows, keys), dtype=torch.bool, device=query_BHRD.device).tril(keys - rows)
    scores_BHRS = scores_BHRS.masked_fill(~mask_B1RS, torch.finfo(scores_BHRS.dtype).min)
    weights_BHRS = scores_BHRS.softmax(dim=-1, dtype=torch.float32).to(query_BHRD.dtype)
    return (weights_BHRS @ value_BHSD).transpose(1, 2).contiguous()
