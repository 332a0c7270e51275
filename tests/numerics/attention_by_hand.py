"""Attention of rows of a layout behind prefixes, counted out row by row."""

import dataclasses

import torch

from blockroll.kernels.pages import Pages
from blockroll.policies.layout import causal_rows, fused_rows, two_forward_rows

LAYOUTS = {
    "one row": causal_rows(1),
    "causal": causal_rows(6),
    "two-forward": two_forward_rows(3, 4),
    "masks alone": two_forward_rows(0, 5),
    "fused": fused_rows(3, (0, 3)),
    "fused at one level": fused_rows(2, (1,)),
    "fused with last levels first": fused_rows(3, (3, 1, 0)),
}
LENGTHS = (0, 1, 16, 33)
PAGE = 16


@dataclasses.dataclass
class Numbers:
    """Queries, new keys and values, and prefixes of each request as they are, without pages."""

    query: torch.Tensor
    new: list[torch.Tensor]
    prefix: list[list[torch.Tensor]]  # keys and values by request, (G, length, D)


def numbers(layout, *, heads=(4, 2), width=5, lengths=LENGTHS, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    size, rows = len(lengths), layout.num_rows
    return Numbers(
        drawn(size, heads[0], rows, width),
        [drawn(size, heads[1], rows, width) for _ in range(2)],
        [[drawn(heads[1], max(length, 0), width) for length in lengths] for _ in range(2)],
    )


def paged(prefix, *, size=PAGE, poison=torch.nan):
    """The same prefixes in pages that lie anyhow; whatever holds no row of theirs is poison."""
    keys, _ = prefix
    counts = [-(-each.shape[1] // size) for each in keys]
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(1)).tolist()
    spare, free = order[0], order[1:]
    table = torch.full((len(keys), max(1, *counts) + 1), spare)
    held = [torch.full((len(order), keys[0].shape[0], size, keys[0].shape[2]), poison, dtype=keys[0].dtype)]
    held.append(held[0].clone())
    for request, count in enumerate(counts):
        for place in range(count):
            page = table[request, place] = free.pop()
            for pages, rows in zip(held, prefix, strict=True):
                part = rows[request][:, place * size : (place + 1) * size]
                pages[page, :, : part.shape[1]] = part
    return Pages(keys_NGZD=held[0], values_NGZD=held[1], table_BT=table)


def seen_by(layout, length, sliding_window):
    """Of each row the keys that it sees, prefix first and then new rows, counted out by hand.

    A text of a length below 0 begins later: keys are the new rows, and those before it see nothing.
    """
    early = max(-length, 0)
    rows = [(length + row, [*range(early, length + early + row + 1)]) for row in range(layout.num_clean)]
    positions = [*range(length), *(position for position, _ in rows)]
    for block, level in enumerate(layout.levels):
        own = [length + layout.num_clean + block * layout.width + slot for slot in range(layout.width)]
        known = [*range(length + level + 1), *own]
        for slot in range(layout.width):
            rows.append((length + level + 1 + slot, known))
            positions.append(length + level + 1 + slot)
    near = sliding_window or 10**9
    return [[key for key in keys if position - positions[key] < near] for position, keys in rows]


def by_hand(given, layout, lengths, *, scaling=None, softcap=None, sliding_window=None):
    """Row by row and head by head, over the keys that are seen and no other."""
    size, heads, _, width = given.query.shape
    out = torch.zeros(size, layout.num_rows, heads, width, dtype=torch.float64)
    for request, length in enumerate(lengths):
        keys, values = (
            torch.cat([prefix[request], new[request]], dim=1).double()
            for prefix, new in zip(given.prefix, given.new, strict=True)
        )
        for row, seen in enumerate(seen_by(layout, length, sliding_window)):
            for head in range(heads):
                key_head = head // (heads // keys.shape[0])
                scores = keys[key_head, seen] @ given.query[request, head, row].double()
                scores = scores * (width**-0.5 if scaling is None else scaling)
                if softcap is not None:
                    scores = softcap * (scores / softcap).tanh()
                out[request, row, head] = scores.softmax(dim=0) @ values[key_head, seen]
    return out
