"""What a checkpoint's rollouts take of memory, as a table before anything is loaded: a part of doctor."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from blockroll.config import RunConfig, load_config
from blockroll.errors import InvalidInput
from blockroll.rollout.engine.budget import size

if TYPE_CHECKING:
    import torch

    from blockroll.rollout.pool.memory import CachePlan, DeviceMemory

TYPICAL_TOKENS = 1024  # of a text, prompt and completion
_SAID_OTHERWISE = {"policy.path": "--model", "policy.device": "--device", "policy.adapter": "--adapter"}


def config_of(overrides: Sequence[str]) -> RunConfig:
    """The config that options such as `rollout.max_batch_size=256` make of the defaults."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        option = _SAID_OTHERWISE.get(key)
        if option is not None:
            raise InvalidInput(f"{override}: here it is {option}")
        if key.partition(".")[0] not in ("policy", "rollout"):
            raise InvalidInput(
                f"{override}: what a checkpoint takes depends on options of policy and rollout alone, as "
                "policy.dtype=bfloat16 or rollout.max_batch_size=256"
            )
    return load_config(None, ["rollout.num_replicas=1", *overrides])


def show_memory(
    model: str, adapter: Path | None, device: str, config: RunConfig, console: Console
) -> dict[str, Any]:
    """Print what weights, forwards and cache take, and how many requests that serves. The same as fields.

    InvalidInput, with the numbers, for a checkpoint that does not fit.
    """
    from blockroll.policies.footprint import bare_policy, stored_bytes
    from blockroll.policies.loading import resolve_checkpoint, resolve_device
    from blockroll.rollout.pool.memory import CachePlan, DeviceMemory, num_sharing, plan_of

    place, policy = resolve_device(device), config.policy
    bare = bare_policy(
        model, dtype=policy.dtype, adapter=adapter, prepack=policy.prepack, compile=policy.compile
    )
    stored = stored_bytes(resolve_checkpoint(model))
    memory, num_engines = DeviceMemory.of(place), num_sharing(config.rollout, place)
    plan = CachePlan.of(
        bare,
        config.rollout,
        plan_of(bare, config.rollout),
        memory,
        device=place,
        num_engines=num_engines,
    )
    fields = _fields(plan, memory, place, stored)
    console.print(_table(fields, f"memory of one replica, in {policy.dtype} on {place}"))
    for sentence in _sentences(plan, num_engines):
        console.print(sentence, markup=False)
    in_float32 = plan.footprint.weights // bare.model.dtype.itemsize * 4
    if in_float32 > memory.free:
        raise InvalidInput(
            f"a checkpoint is checked in float32, in which its weights take {size(in_float32)}, and "
            f"{size(memory.free)} are free on {place}: its memory is told, and no more; check it on a larger "
            "device"
        )
    return fields


def _fields(
    plan: "CachePlan", memory: "DeviceMemory", device: "torch.device", stored: dict[str, int]
) -> dict[str, Any]:
    footprint, budget, room = plan.footprint, plan.budget, plan.room
    longest = room.max_text
    return {
        "device": str(device),
        "total": memory.total,
        "free": memory.free,
        "stored": stored,
        "weights": footprint.weights,
        "packed_at_most": footprint.packed,
        "adapter": footprint.adapter,
        "prefill_rows": plan.prefill_rows,
        "prefill_about": plan.prefill_rows * footprint.prefill_row,
        "logits_rows": plan.logits_rows,
        "logits_about": plan.logits_rows * footprint.logits_row,
        "keys_and_values_of_a_token": budget.row,
        "page_size": room.page_size,
        "page": room.page_size * budget.row,
        "cache_pages": room.num_pages,
        "cache_rows": room.num_pages * room.page_size or budget.rows,
        "cache": plan.num_bytes,
        "states_of_slots": budget.beside,
        "states_along_rows": plan.snapshots,
        "graph_shapes": plan.num_shapes,
        "graph_buffers": plan.graphs,
        "requests": {
            str(length): {
                "together": room.num_texts(length),
                "bytes": room.num_texts(length) * room.rows_of(length) * budget.row,
            }
            for length in sorted({min(TYPICAL_TOKENS, longest), longest})
        },
    }


def _table(fields: dict[str, Any], title: str) -> Table:
    stored = ", ".join(f"{size(each)} of {dtype}" for dtype, each in fields["stored"].items())
    rows = [("weights" + (f" (in the folder: {stored})" if stored else ""), size(fields["weights"]))]
    if fields["packed_at_most"]:
        words = "copies of linear weights, where they gain time"
        rows.append((words, f"up to {size(fields['packed_at_most'])}"))
    if fields["adapter"]:
        rows.append(("draft adapter, with what is copied of it", size(fields["adapter"])))
    rows += [
        (f"a prefill of {fields['prefill_rows']:,} rows", f"about {size(fields['prefill_about'])}"),
        (f"logits of {fields['logits_rows']:,} rows, a step's", f"about {size(fields['logits_about'])}"),
        ("keys and values of a token", size(fields["keys_and_values_of_a_token"])),
    ]
    pages = ""
    if fields["cache_pages"]:
        rows.append((f"of a page of {fields['page_size']} tokens", size(fields["page"])))
        pages = f" in {fields['cache_pages']:,} pages"
    words = f"keys and values in all: {fields['cache_rows']:,} tokens{pages}"
    rows.append((words, size(fields["cache"])))
    if fields["states_of_slots"]:
        rows += [
            ("states of all slots, with their candidates", f"up to {size(fields['states_of_slots'])}"),
            ("states kept along keys and values", f"up to {size(fields['states_along_rows'])}"),
        ]
    if fields["graph_shapes"]:
        words = f"buffers of forwards in {fields['graph_shapes']:,} shapes"
        rows.append((words, f"up to {size(fields['graph_buffers'])}"))
    for length, served in fields["requests"].items():
        words = f"of them, requests of {int(length):,} tokens at once: {served['together']}"
        rows.append((words, size(served["bytes"])))
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("what")
    table.add_column("takes", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _sentences(plan: "CachePlan", num_engines: int) -> Iterator[str]:
    budget = plan.budget
    shared = f", and {num_engines} replicas share it" if num_engines > 1 else ""
    free = f"{size(budget.free)} are free behind the weights{shared}"
    yield f"the device has {size(budget.total)}, of which {free}"
    if budget.is_scarce:
        yield plan.notice
    elif budget.max_rows:
        yield "rollout.max_cache_rows bounds keys and values, whatever there is"
    else:
        yield (
            f"rollout.memory_fraction gives {budget.share:g} of the device to keys and values, and "
            f"rollout.max_batch_size lets {plan.room.max_slots} requests run at once"
        )
