"""Writes the cache rows of texts that join, each text's once, and of its beginning only what no slot holds.

Groups share a prompt, chats a template, and the next turn of a text everything before it. Texts that begin
together can have their first step's draft forward in the same one.

Shapes: B texts, C columns, K drafted tokens, V vocabulary.
"""

from collections.abc import Sequence
from itertools import groupby

from torch import Tensor

from blockroll.kernels.transfer import sent
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
    if policy.state_shape:
        num_drafts = None  # a state goes with a text to another slot, those of its pending rows do not
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
    lacks_all = all(num_rows < len(text) for text, (_, num_rows) in found.items())
    if longest - widest < ROW_STEP and lacks_all:  # copies would save no forward worth them
        found = dict.fromkeys(found, (start, 0))
    widths = _widths(found, is_recurrent=bool(policy.state_shape))
    texts = sorted(found, key=lambda text: widths[text] or longest + 1)  # those that lack no row come last
    # All of one forward get as many rows: where a text is shorter than that, rows before its first token,
    # behind a length below 0.
    begins = [len(text) - widths[text] for text in texts]
    cache.share(start, [found[text][0] for text in texts], begins)
    logits, first = None, start
    for width, alike in groupby(texts, key=widths.__getitem__):
        if not width:
            break
        rows = list(alike)
        columns = [[*[0] * (width - len(text)), *text[-width:]] for text in rows]
        ids_BC = sent(columns, policy.device)
        stop = first + len(rows)
        if num_drafts is None:
            policy.prefill(ids_BC, cache.settled_window(first, stop, width))
        else:
            logits = policy.draft_logits(ids_BC, num_drafts, cache.window(first, stop, width + num_drafts))
        cache.commit(first, [text[max(len(text) - width, 0) : len(text) - num_anchors] for text in rows])
        first = stop
    return {text: found[text][1] for text in texts}, logits


def _widths(found: dict[Text, tuple[int, int]], *, is_recurrent: bool) -> dict[Text, int]:
    """New rows of each text in its forward; 0 of those that lack none.

    Through attention alone all go in one, with as many as the text that lacks most: a row that is computed
    again is the same. A recurrent state stands where the rows that were found end, or before the first token.
    """

    def is_tied(text: Text) -> bool:
        return is_recurrent and found[text][1] > 0

    lacking = {text: len(text) - num_rows for text, (_, num_rows) in found.items()}
    widest = max((number for text, number in lacking.items() if not is_tied(text)), default=0)
    return {text: number if is_tied(text) or not number else widest for text, number in lacking.items()}
