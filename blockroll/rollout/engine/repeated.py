"""Forwards of few shapes, each in buffers of its own: what a device needs to run them as graphs.

A forward over a window of pages is widened to the next number of requests and of pages that this module
knows. Its inputs are copied into the buffers of that shape, and the policy runs on them; on a GPU that run is
captured once, and repeated from then on without a word from the host. Requests that only fill a shape have no
rows of their own: they read page 0, which no text has, and leave it as it is.

Law: a request's logits do not depend on what else stands in a shape. Whether a step runs in one changes them
by rounding alone.

Shapes: B requests, C tokens of each, T pages of a table, K drafted tokens, V vocabulary, W hidden width.
"""

import sys
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from blockroll.errors import InvalidInput
from blockroll.policies.base import FusedRows, KVWindow, Policy
from blockroll.rollout.engine.cache.contract import ROW_STEP, Cache
from blockroll.rollout.engine.cache.page_memory import PageMemory
from blockroll.rollout.engine.cache.paged_window import PagedWindow
from blockroll.rollout.engine.cache.pages import PagedCache
from blockroll.types import Plan, PlanKind

Graphs = Literal["auto", "on", "off", "buckets"]
Forward = Callable[[Tensor, PagedWindow], Any]  # tokens and a window: logits, or rows with states

_WARM_UPS = 2  # runs before one is captured: what is made at first use must not lie in the graph's memory


def bucket(count: int) -> int:
    """The least number at or above `count` that is a power of two, or half as much again."""
    power = 1 << max(count - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


@dataclass(frozen=True, slots=True)
class Shape:
    """Of one forward; two of the same shape have the same buffers."""

    kind: Hashable  # of forward, with what else it is of
    num_tokens: int  # of each request
    size: int  # requests
    num_pages: int  # of each request's table

    @property
    def num_bytes(self) -> int:
        """Of its buffers: tokens, tables and lengths."""
        return self.size * (self.num_tokens + self.num_pages + 1) * torch.int64.itemsize


def shapes_of(plans: Iterable[Plan], *, max_size: int, max_length: int, page_size: int) -> set[Shape]:
    """All that forwards of these plans may have, of up to so many requests of up to so many tokens."""
    sizes = {bucket(size) for size in range(1, max_size + 1)}
    step = max(ROW_STEP, page_size)
    shapes = set()
    for kind, num_tokens, num_rows in {each for plan in plans for each in _forwards(plan)}:
        # Of a text that is not at its end yet, all rows but the anchor's stand before these.
        least, most = -(-num_rows // step), -(-(max_length - 2 + num_rows) // step)
        widths = {bucket(step * number // page_size) for number in range(least, most + 1)}
        shapes |= {Shape(kind, num_tokens, size, width) for size in sizes for width in widths}
    return shapes


def _forwards(plan: Plan) -> list[tuple[Hashable, int, int]]:
    """Of its steps: the kind, tokens of a request, and rows up to the last that it writes."""
    num_drafts, width = plan.num_drafts, plan.num_drafts + 1
    match plan.kind:
        case PlanKind.PLAIN:
            return [("verify", 1, 1)]
        case PlanKind.TWO_FORWARD:
            return [(("draft", num_drafts), 1, width), ("verify", num_drafts, width)]
        case PlanKind.FUSED:
            fused = (("fused", plan.levels), width, plan.rows_per_forward)
            return [(("draft", num_drafts), 1, width), fused]
        case PlanKind.ONE_FORWARD:
            return [("verify", each, each) for each in range(1, width + 1)]


def repeats(graphs: Graphs, device: torch.device, *, has_pages: bool) -> bool:
    """Whether forwards run in few shapes; no word on whether they can, which `forwards_of` has."""
    return graphs in ("on", "buckets") or (graphs == "auto" and device.type == "cuda" and has_pages)


def forwards_of(policy: Policy, cache: Cache, graphs: Graphs) -> Policy:
    """The policy, or one whose forwards run in few shapes. InvalidInput where there can be no graphs."""
    device, has_pages = policy.device.type, isinstance(cache, PagedCache)
    if graphs not in ("auto", "on", "off", "buckets"):
        raise InvalidInput(f"graphs is {graphs!r}; allowed are 'auto', 'on', 'off' and 'buckets'")
    if graphs == "on" and device != "cuda":
        raise InvalidInput(
            f"graphs is 'on', but the policy is on {device!r}, where no graph can be captured; use 'auto', "
            "which captures them on a GPU"
        )
    if graphs in ("on", "buckets") and policy.state_shape:
        raise InvalidInput(
            f"graphs is {graphs!r}, and layers of this policy carry states, which no forward in fixed "
            "buffers takes along; use 'auto' or 'off'"
        )
    if graphs in ("on", "buckets") and not has_pages:
        raise InvalidInput(f"graphs is {graphs!r}, which needs the cache in pages; set cache to 'pages'")
    return RepeatedPolicy(policy) if repeats(graphs, policy.device, has_pages=has_pages) else policy


class RepeatedPolicy:
    """A policy whose forwards over pages run in few shapes; everything else of it is the policy's own."""

    least_saved_rows = sys.maxsize  # rows are never packed: that would be a shape of its own for each step

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._runs: dict[Shape, _Run] = {}
        self._memory_taken = 0  # as `PageMemory.times_taken`
        self._pool: Any = None  # memory that all graphs share: one runs at a time

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    @property
    def num_shapes(self) -> int:
        """Shapes that have buffers now."""
        return len(self._runs)

    @property
    def num_bytes(self) -> int:
        """Of the buffers of these shapes; what a graph keeps of its forward lies beside them."""
        return sum(run.num_bytes for run in self._runs.values())

    def weights_changed(self) -> None:
        """Tell the policy; graphs that were captured read other memory, so they are made anew."""
        self._policy.weights_changed()
        self._runs.clear()

    def release_memory(self) -> None:
        """Give buffers and graphs back; the next forwards make them anew."""
        self._runs.clear()
        self._pool = None

    def verify_logits(self, ids_BR: Tensor, window: KVWindow) -> Tensor:
        """As the policy's."""
        if not isinstance(window, PagedWindow):
            return self._policy.verify_logits(ids_BR, window)
        num_rows = ids_BR.shape[1]
        logits_BRV: Tensor = self._over_pages("verify", ids_BR, num_rows, window, self._policy.verify_logits)
        return logits_BRV

    def draft_logits(self, ids_BC: Tensor, num_drafts: int, window: KVWindow) -> Tensor:
        """As the policy's."""
        if not isinstance(window, PagedWindow):
            return self._policy.draft_logits(ids_BC, num_drafts, window)

        def forward(ids_BC: Tensor, window: PagedWindow) -> Tensor:
            return self._policy.draft_logits(ids_BC, num_drafts, window)

        num_rows = ids_BC.shape[1] + num_drafts
        logits: Tensor = self._over_pages(("draft", num_drafts), ids_BC, num_rows, window, forward)
        return logits

    def fused_rows(self, ids_BL: Tensor, levels: tuple[int, ...], window: KVWindow) -> FusedRows:
        """As the policy's."""
        if not isinstance(window, PagedWindow):
            return self._policy.fused_rows(ids_BL, levels, window)

        def forward(ids_BL: Tensor, window: PagedWindow) -> FusedRows:
            return self._policy.fused_rows(ids_BL, levels, window)

        num_rows = ids_BL.shape[1] * (len(levels) + 1)
        rows: FusedRows = self._over_pages(("fused", levels), ids_BL, num_rows, window, forward)
        return rows

    def _over_pages(
        self,
        kind: Hashable,
        ids_BC: Tensor,
        num_rows: int,
        window: PagedWindow,
        forward: Forward,
    ) -> Any:
        """One forward in the least shape that holds it; what it gives is of these requests alone."""
        memory, (size, num_tokens) = window.memory, ids_BC.shape
        # Autocast keeps its casts of weights from one forward to the next: a graph would read old ones.
        is_autocast = torch.is_autocast_enabled(memory.device.type)
        if window.packing is not None or window.picked is not None or is_autocast:
            return forward(ids_BC, window)
        if self._memory_taken != memory.times_taken:  # what was captured reads memory that is gone
            self._runs.clear()
            self._memory_taken = memory.times_taken
        shape = Shape(kind, num_tokens, bucket(size), bucket(window.table_BT.shape[1]))
        run = self._runs.get(shape)
        if run is None:
            run = self._runs[shape] = _Run(memory, shape, num_rows, forward)
        run.fill(ids_BC, window)
        if memory.device.type == "cuda":
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            run.capture(self._pool)
        return _first(run(), size, copies=run.is_captured)


class _Run:
    """One forward on buffers of one shape, captured if it is told to be."""

    def __init__(
        self,
        memory: PageMemory,
        shape: Shape,
        num_rows: int,
        forward: Forward,
    ) -> None:
        """Of `num_rows` rows a request, the first have the shape's tokens."""
        self._memory, self._num_rows, self._forward = memory, num_rows, forward
        with torch.inference_mode(False):
            self._ids_BC, self._table_BT, self._lengths_B = (
                torch.zeros((shape.size, *behind), dtype=torch.int64, device=memory.device)
                for behind in ((shape.num_tokens,), (shape.num_pages,), ())
            )
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: Any = None

    @property
    def num_bytes(self) -> int:
        """Of its buffers."""
        return self._ids_BC.nbytes + self._table_BT.nbytes + self._lengths_B.nbytes

    def fill(self, ids_BC: Tensor, window: PagedWindow) -> None:
        """Take these requests; those behind them are empty, in page 0."""
        size, num_pages = window.table_BT.shape
        for buffer, values in ((self._ids_BC, ids_BC), (self._lengths_B, window.lengths_B)):
            buffer[:size] = values
            buffer[size:] = 0
        self._table_BT[:size, :num_pages] = window.table_BT
        self._table_BT[:size, num_pages:] = 0
        self._table_BT[size:] = 0

    def capture(self, pool: Any) -> None:
        """Have a graph of the forward, in memory of this pool; once."""
        if self._graph is not None:
            return
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self._output = self._run()
        self._graph = graph

    def __call__(self) -> Any:
        """What the forward gives for all requests of the shape; of a graph, memory that it writes again."""
        if self._graph is None:
            return self._run()
        self._graph.replay()
        return self._output

    @property
    def is_captured(self) -> bool:
        """Whether it is a graph by now."""
        return self._graph is not None

    def _run(self) -> Any:
        window = PagedWindow(self._memory, self._table_BT, self._lengths_B, self._num_rows, has_empty=True)
        return self._forward(self._ids_BC, window)


def _first(output: Any, size: int, *, copies: bool) -> Any:
    """Of the first requests, so many; copies where the next run writes into the same memory."""
    if isinstance(output, FusedRows):
        parts = {each.name: getattr(output, each.name) for each in fields(output)}
        return FusedRows(**{name: _first(part, size, copies=copies) for name, part in parts.items()})
    return output[:size].clone() if copies else output[:size]
