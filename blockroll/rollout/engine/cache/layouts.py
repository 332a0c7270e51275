"""Which layout a cache has, and which form of the kernels runs over it."""

from typing import Literal

import torch

from blockroll.errors import InvalidInput
from blockroll.kernels.choice import Chosen, Form, Kernels, choose
from blockroll.kernels.pages import unserved
from blockroll.kernels.rows.tiles import LARGEST_VOCABULARY
from blockroll.policies.base import Policy
from blockroll.rollout.engine.cache.contract import Cache
from blockroll.rollout.engine.cache.pages import PagedCache
from blockroll.rollout.engine.cache.recurrent import RecurrentCache
from blockroll.rollout.engine.cache.slots import SlotCache

Layout = Literal["auto", "slots", "pages"]

PAGE_SIZE = 16
MAX_PAGE_SIZE = 1024


def layout_of(device: torch.device, layout: Layout, form: Form) -> Layout:
    """`auto` is slots on a CPU, where torch's attention reads keys in place, and pages for kernels."""
    if layout == "auto":
        return "slots" if device.type == "cpu" and form == "reference" else "pages"
    return layout


def kernels_of(
    kernels: Kernels, policy: Policy, layout: Layout, page_size: int, device: torch.device | None = None
) -> Chosen:
    """What runs for a policy over such a cache, on its device or another; InvalidInput where `triton` has no
    pages, or none that it serves."""
    device = device or policy.device
    chosen = choose(kernels, device)
    if chosen.form == "reference":
        return chosen
    has_pages = layout_of(device, layout, chosen.form) == "pages"
    shape = policy.kv_shape
    problem = unserved(shape.width, page_size, shape.dtype) if has_pages else None
    if policy.vocab_size > LARGEST_VOCABULARY:
        most = LARGEST_VOCABULARY
        problem = f"the vocabulary has {policy.vocab_size} tokens; Triton's kernels serve {most} at most"
    if problem is not None:
        if kernels == "triton":
            raise InvalidInput(f"kernels is 'triton', and {problem}; use 'auto' to do without them")
        return Chosen("reference", problem)
    if has_pages:
        return chosen
    if kernels == "triton":
        raise InvalidInput("kernels is 'triton', which reads keys in pages; set cache to 'pages' or 'auto'")
    return Chosen(chosen.form, f"{chosen.reason}; attention by torch, because the cache is in slots")


def make_cache(policy: Policy, layout: Layout, form: Form, *, page_size: int, max_rows: int) -> Cache:
    """A cache for a policy, its pages of so many rows; `max_rows` bounds those of all pages, 0 does not."""
    layout = layout_of(policy.device, layout, form)
    rows = _rows(policy, layout, page_size=page_size, max_rows=max_rows)
    return RecurrentCache(policy, rows, max_rows=max_rows) if policy.state_shape else rows


def _rows(policy: Policy, layout: Layout, *, page_size: int, max_rows: int) -> Cache:
    check_page_size(page_size)
    match layout:
        case "slots":
            return SlotCache(policy)
        case "pages":
            if max_rows and max_rows < page_size:
                raise InvalidInput(
                    f"the cache may have {max_rows} rows, less than a page of {page_size}; give it more "
                    "memory (memory_fraction), or smaller pages (page_size)"
                )
            return PagedCache(policy, page_size=page_size, max_rows=max_rows)
        case other:
            raise InvalidInput(f"cache is {other!r}; allowed are 'auto', 'slots' and 'pages'")


def open_slots(policy: Policy, *, num_slots: int, capacity: int) -> Cache:
    """So many open and empty slots with room for `capacity` rows each, for forwards without an engine."""
    rows = SlotCache(policy, num_slots=num_slots, capacity=capacity)
    return RecurrentCache(policy, rows) if policy.state_shape else rows


def check_page_size(page_size: int) -> None:
    """Raise InvalidInput unless it is a power of two in bounds."""
    if not 1 <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
        raise InvalidInput(
            f"page_size is {page_size}; it must be a power of two from 1 to {MAX_PAGE_SIZE}, and "
            f"{PAGE_SIZE} where nothing speaks for another"
        )
