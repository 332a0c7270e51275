"""What memory a device has, and what of it the keys and values of a policy may take."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from blockroll.config import RolloutConfig
from blockroll.errors import InvalidInput
from blockroll.policies.footprint import Footprint
from blockroll.rollout.engine.budget import CacheBudget, size
from blockroll.rollout.engine.cache.layouts import kernels_of, layout_of
from blockroll.rollout.engine.cache.state import StateMemory
from blockroll.rollout.engine.chunks import MAX_PREFILL_ROWS
from blockroll.rollout.engine.repeated import repeats, shapes_of
from blockroll.rollout.engine.room import CacheRoom
from blockroll.rollout.planning.planner import Planner
from blockroll.rollout.planning.reading import read_plan
from blockroll.types import Plan

if TYPE_CHECKING:
    from blockroll.policies.hf import HFPolicy

_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Bytes of a device, and of them those that nobody uses."""

    total: int
    free: int

    @classmethod
    def of(cls, device: torch.device) -> Self:
        """As it is now. Of a CPU it is the machine's, or what the limits of this process's groups leave."""
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return cls(total=total, free=free + held)
        pages = os.sysconf("SC_PAGE_SIZE")
        total, free = pages * os.sysconf("SC_PHYS_PAGES"), _available()
        for limit, used in _limits():
            total, free = min(total, limit), min(free, limit - used)
        return cls(total=total, free=max(free, 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """What the cache of one engine will be, and why."""

    footprint: Footprint
    budget: CacheBudget
    room: CacheRoom
    prefill_rows: int  # of the largest prefill
    logits_rows: int  # of the largest step
    states: StateMemory
    graphs: int  # bytes of buffers of forwards in few shapes, at most
    num_shapes: int

    @classmethod
    def of(
        cls,
        policy: "HFPolicy",
        config: RolloutConfig,
        plan: Plan | Planner,
        memory: DeviceMemory,
        *,
        device: torch.device | None = None,
        num_engines: int = 1,
    ) -> Self:
        """Of a loaded policy; or of a bare one for a device, where `memory` is before anything is loaded.

        InvalidInput, with the numbers, where weights or the shortest text have no room.
        """
        plans = (plan,) if isinstance(plan, Plan) else plan.candidates
        place = policy.device if device is None else device
        footprint = Footprint.of(policy, place)
        if device is not None:
            _check_weights(footprint, memory, device, num_engines)
        to_come = footprint.loaded if device is not None else footprint.packed - policy.packed.num_bytes
        max_length = config.max_length or policy.max_length
        form = kernels_of(config.kernels, policy, config.cache, config.page_size, place).form
        has_pages = layout_of(place, config.cache, form) == "pages"
        shapes = set()
        if not policy.state_shape and repeats(config.graphs, place, has_pages=has_pages):
            sizes = {"max_size": config.max_batch_size, "max_length": max_length}
            shapes = shapes_of(plans, **sizes, page_size=config.page_size)
        graphs = sum(shape.num_bytes for shape in shapes)
        states = StateMemory.of(footprint.state_shape, footprint.kv_shape)
        num_drafts = max(each.num_drafts for each in plans)
        logits_rows = config.max_batch_size * (1 + num_drafts)
        budget = CacheBudget(
            total=memory.total,
            free=memory.free - (to_come + graphs) * num_engines,
            share=config.memory_fraction,
            forward=footprint.forward(prefill_rows=MAX_PREFILL_ROWS, logits_rows=logits_rows),
            num_engines=num_engines,
            row=footprint.kv_shape.num_bytes,
            beside=config.max_batch_size * states.slot(num_drafts=num_drafts, max_rows=max_length - 2),
            snapshot=states.state,
            snapshot_rows=states.step,
            max_rows=config.max_cache_rows,
        )
        room = CacheRoom(
            max_slots=config.max_batch_size,
            max_rows=budget.rows,
            block_rows=max(each.rows_per_forward for each in plans),
            page_size=config.page_size if has_pages else 0,
            max_length=max_length,
        )
        budget.check(room.rows_of(1))
        return cls(
            footprint=footprint,
            budget=budget,
            room=room,
            prefill_rows=MAX_PREFILL_ROWS,
            logits_rows=logits_rows,
            states=states,
            graphs=graphs,
            num_shapes=len(shapes),
        )

    @property
    def num_bytes(self) -> int:
        """Of the rows of the cache at its largest, and of the page that no text has."""
        room = self.room
        num_rows = (room.num_pages + 1) * room.page_size if room.num_pages else self.budget.rows
        return num_rows * self.budget.row

    @property
    def snapshots(self) -> int:
        """Bytes of the states that are kept along the cache's rows, beside those of its slots."""
        most_rows = min(self.budget.rows, self.room.max_slots * self.room.rows_of(self.room.max_length))
        return self.states.most_snapshots(0, most_rows) * self.states.state

    @property
    def notice(self) -> str:
        """Of a budget that is scarce: what there is instead of the share."""
        budget = self.budget
        return (
            f"keys and values may take {size(budget.left)}, {budget.rows} tokens: memory_fraction "
            f"{budget.share:g} of {size(budget.total)} would be {size(budget.asked)}, but "
            f"{size(budget.free)} are free for {budget.num_engines} replicas, and a forward takes up to "
            f"{size(budget.forward)}; free memory, or lower memory_fraction to say that this is meant"
        )


def _check_weights(
    footprint: Footprint, memory: DeviceMemory, device: torch.device, num_engines: int
) -> None:
    needed = footprint.loaded * num_engines
    if needed < memory.free:
        return
    dtype = str(footprint.kv_shape.dtype).removeprefix("torch.")
    parts = f"{size(footprint.weights)} of weights in {dtype}"
    if footprint.packed:
        parts += f" and up to {size(footprint.packed)} of packed copies"
    raise InvalidInput(
        f"{num_engines} replica{'s' * (num_engines > 1)} take {size(needed)} ({parts} each), and "
        f"{size(memory.free)} of {size(memory.total)} are free on {device}: take policy.dtype=bfloat16, "
        "policy.prepack=off, fewer replicas, a larger device or a smaller policy"
    )


def plan_of(policy: "HFPolicy", config: RolloutConfig) -> Plan | Planner:
    """How an engine with this config decodes."""
    return read_plan(
        config.plan,
        policy,
        with_mask_rows=not config.reproducible or config.sampling().is_plan_free,
        with_history=config.history_tokens > 0,
    )


def num_sharing(config: RolloutConfig, device: torch.device) -> int:
    """Replicas of a pool that have one device together, as far as its config tells."""
    if config.replica_kind == "local" or device.type == "cpu":
        return config.num_replicas
    return max(math.floor(1 / config.gpus_per_replica), 1) if config.gpus_per_replica else config.num_replicas


def _available() -> int:
    """Bytes that new work can have without swapping, as the kernel estimates them."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _limits() -> Iterator[tuple[int, int]]:
    """Limits of the control groups that this process is in, and what each uses beside the page cache."""
    for line in _groups():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            files, root = ("memory.max", "memory.current", "inactive_file"), _CGROUPS
        elif "memory" in controllers.split(","):
            root = _CGROUPS / "memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        here = root / path.lstrip("/")
        for folder in (here, *here.parents):
            if folder == root.parent:
                break
            found = _limit(folder, *files)
            if found is not None:
                yield found


def _groups() -> list[str]:
    try:
        return Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []


def _limit(folder: Path, limit: str, usage: str, cache: str) -> tuple[int, int] | None:
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if most == "max" or int(most) > _UNLIMITED:
        return None
    return int(most), max(used - int(stat.get(cache, 0)), 0)
