"""Writes the cache rows of texts that join, each text's once, and of its beginning only what no slot holds.

Groups share a prompt, chats a template, and the next turn of a text everything before it. Texts that begin
together can have their first step's draft forward in the same one.

Shapes: B texts, C columns, K drafted tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from blockroll.policies.base import Policy
from blockroll.rollout.engine.cache.contract import ROW_STEP, Cache

Text = tuple[int, ...]


def prefill(
    policy: Policy, cache: Cache, start: int, texts: Sequence[Text], *, num_drafts: int | None = None
) -> tuple[list[int], Tensor | None]:
    """Commit the rows of `texts` before their last tokens, the anchors, to slots start.., in their order.

    Returns how many rows each took over; a text that stands there twice takes over all rows of the first. If
    a forward raises, the slots before `start` are as they were, and all others hold valid rows or none.
    With `num_drafts`, it returns `Policy.draft_logits` of anchors and as many masks as well, (B, K + 1, V),
    where one forward for all of it has no more rows than two: then the anchors' rows are there, uncommitted.
    """
    # Where rotary factors depend on a text's length, so do the rows of its beginning.
    is_shared = not policy.length_boundaries
    prefixes = {text: cache.longest_prefix(text[:-1]) if is_shared else (start, 0) for text in texts}
    if num_drafts is not None and not _is_one_forward(prefixes, len(texts), num_drafts):
        num_drafts = None
    num_pending = 0 if num_drafts is None else 1 + num_drafts
    bodies = [text[:-1] for text in texts] if num_drafts is None else list(texts)
    found = {body: prefixes[text] for body, text in zip(bodies, texts, strict=True)}
    num_reused, logits = _fill(policy, cache, start, found, num_drafts)
    order = list(num_reused)
    sources = [order.index(body) for body in bodies]
    lengths = [len(text) - 1 for text in texts]
    cache.share(start, [start + source for source in sources], lengths, num_pending=num_pending)
    if logits is not None:
        logits = logits[sources]
    return [num_reused.pop(body, length) for body, length in zip(bodies, lengths, strict=True)], logits


def _is_one_forward(prefixes: dict[Text, tuple[int, int]], num_texts: int, num_drafts: int) -> bool:
    """Whether prefill and draft forward have no fewer rows apart: a long text widens a forward for all."""
    lacking = [len(text) - 1 - num_rows for text, (_, num_rows) in prefixes.items()]
    num_apart = sum(map(bool, lacking)) * max(lacking) + num_texts * (num_drafts + 1)
    return len(lacking) * (max(lacking) + num_drafts + 1) <= num_apart


def _fill(
    policy: Policy,
    cache: Cache,
    start: int,
    found: dict[Text, tuple[int, int]],
    num_drafts: int | None,
) -> tuple[dict[Text, int], Tensor | None]:
    """Commit different texts to slots start.., in the order of the result: the rows each took over.

    `found` are slots that hold the first rows of each, and how many. With `num_drafts` the last token of each
    text is its anchor.
    """
    num_anchors = int(num_drafts is not None)
    longest = max(map(len, found))
    widest = max(len(text) - num_rows for text, (_, num_rows) in found.items())
    texts = sorted(found, key=lambda text: found[text][1] == len(text))  # those that lack rows come first
    num_computed = sum(found[text][1] < len(text) for text in texts)
    if longest - widest < ROW_STEP and num_computed == len(texts):  # copies would save no forward worth them
        found, widest = dict.fromkeys(found, (start, 0)), longest
    # In one forward all get as many rows as the text that lacks most: where a text is shorter than that, rows
    # before its first token, behind a length below 0.
    begins = [len(text) - widest if row < num_computed else len(text) for row, text in enumerate(texts)]
    cache.share(start, [found[text][0] for text in texts], begins)
    logits = None
    if num_computed:
        slots = (start, start + num_computed)
        columns = [[*[0] * (widest - len(text)), *text[-widest:]] for text in texts[:num_computed]]
        ids_BC = torch.tensor(columns, device=policy.device)
        window = cache.window(*slots, widest + (num_drafts or 0))
        if num_drafts is None:
            policy.prefill(ids_BC, window)
        else:
            logits = policy.draft_logits(ids_BC, num_drafts, window)
        cache.commit(
            start,
            [
                text[max(begin, 0) : len(text) - num_anchors]
                for text, begin in zip(texts[:num_computed], begins, strict=False)
            ],
        )
    return {text: found[text][1] for text in texts}, logits
