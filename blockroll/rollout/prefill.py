"""Writes the cache rows of texts that join, each text's once, and of its beginning only what no slot holds.

Groups share a prompt, chats a template, and the next turn of a text everything before it.
"""

from collections.abc import Sequence

import torch

from blockroll.policies.base import Policy
from blockroll.rollout.cache import ROW_STEP, SlotCache

Text = tuple[int, ...]


def prefill(policy: Policy, cache: SlotCache, start: int, texts: Sequence[Text]) -> list[int]:
    """Commit the rows of `texts` to slots start.., in their order; how many rows each took over.

    A text that stands there twice takes over all rows of the first.
    """
    num_reused = _fill(policy, cache, start, list(dict.fromkeys(texts)))
    slots = {text: slot for slot, text in enumerate(num_reused, start=start)}
    cache.take_over(start, [slots[text] for text in texts], [len(text) for text in texts])
    for slot, text in enumerate(texts, start=start):
        cache.hold(slot, text)
    return [num_reused.pop(text, len(text)) for text in texts]


def _fill(policy: Policy, cache: SlotCache, start: int, texts: list[Text]) -> dict[Text, int]:
    """Commit different texts to slots start.., in the order of the result: the rows each took over."""
    found = {text: cache.longest_prefix(text) for text in texts}
    longest = max(map(len, texts))
    widest = max(len(text) - num_rows for text, (_, num_rows) in found.items())
    if longest - widest < ROW_STEP:  # copies would save no forward worth them
        found, widest = dict.fromkeys(texts, (start, 0)), longest
    # In one forward all get as many rows as the text that lacks most, and must have room for them.
    room = cache.capacity - widest
    num_reused = {text: min(num_rows, room) for text, (_, num_rows) in found.items()}
    num_reused = dict(sorted(num_reused.items(), key=lambda item: item[1] - len(item[0])))
    cache.take_over(start, [found[text][0] for text in num_reused], list(num_reused.values()))
    lacking = [text[num_rows:] for text, num_rows in num_reused.items() if num_rows < len(text)]
    if lacking:
        lengths = [len(ids) for ids in lacking]
        ids_BR = torch.tensor([[*ids, *[0] * (max(lengths) - len(ids))] for ids in lacking])
        window = cache.window(start, start + len(lacking), max(lengths))
        policy.prefill(ids_BR.to(policy.device), window)
        cache.commit(start, start + len(lacking), torch.tensor(lengths, device=policy.device))
    return num_reused
