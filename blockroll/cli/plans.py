"""What `auto` knows of a policy's plans on this machine, as a table: a part of doctor."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from blockroll.types import HISTORY

if TYPE_CHECKING:
    from blockroll.policies.hf import HFPolicy
    from blockroll.rollout.planning.probes import PlanCost


def show_plans(policy: "HFPolicy", console: Console) -> dict[str, Any]:
    """Measure what its plans cost; print that and how its layers are run here. The same as fields."""
    from blockroll.rollout.drafters.mask_rows import MaskRows
    from blockroll.rollout.planning.candidates import read_costs
    from blockroll.rollout.planning.probes import probe

    costs = read_costs(policy)
    found = probe(policy, costs, drafters=[MaskRows()])
    costs.save()
    console.print(_table(found, f"plans of auto, in {str(policy.model.dtype).removeprefix('torch.')}"))
    reason = (
        "a plan pays where a step commits more tokens of a request than it costs plain steps; 'auto' counts "
        "those of mask rows, asks history for each text, and takes the plan with the most tokens for its "
        "cost, plain where none pays"
    )
    compiled, packed = _compiled(policy), _packed(policy)
    for sentence in (reason, compiled, packed):
        console.print(sentence, markup=False)
    return {
        "plans": [
            {
                "batch_size": each.batch_size,
                "plan": each.plan.name,
                "plain_steps": each.cost,
                "plain_ms": each.plain_ms,
            }
            for each in found
        ],
        "compiled": compiled,
        "packed": packed,
    }


def _table(found: "Sequence[PlanCost]", title: str) -> Table:
    """A row for each plan, a column for each batch."""
    batches = {each.batch_size: each.plain_ms for each in found}
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("plan", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    for size in batches:
        table.add_column(f"batch {size}", justify="right", no_wrap=True)
    table.add_column("pays from")
    table.add_row("plain", "1", *(f"{each:.1f} ms" for each in batches.values()), "")
    for plan in dict.fromkeys(each.plan for each in found):
        costs = [each.cost for each in found if each.plan == plan]
        rows = str(plan.rows_per_forward * plan.forwards_per_step)
        table.add_row(plan.name, rows, *(f"{cost:.2f}" for cost in costs), _reason(found, plan.name))
    return table


def _reason(found: "Sequence[PlanCost]", name: str) -> str:
    each = next(each for each in found if each.plan.name == name)
    costs = [one.cost for one in found if one.plan.name == name]
    if each.plan.drafter == HISTORY:
        shares = [max(cost - 1.0, 0.0) / each.plan.num_drafts for cost in costs]
        return " ".join(f"{share:.0%}" if share < 1 else "never" for share in shares) + " accepted"
    most = each.plan.num_drafts + 1
    return " ".join(f"{cost:.1f}" if cost < most else "never" for cost in costs) + " tokens"


def _compiled(policy: "HFPolicy") -> str:
    most = policy.compiled.most_rows
    if most:
        return f"layers are compiled in forwards of up to {most} rows, and read the weights where they lie"
    if policy.device.type != "cpu":
        return f"layers are not compiled: that is for CPUs, and the policy is on {policy.device}"
    return (
        "layers are not compiled: there is no C compiler, or they are narrow, of another shape, or it was "
        "measured to gain nothing"
    )


def _packed(policy: "HFPolicy") -> str:
    num_bytes = policy.packed.num_bytes
    if num_bytes:
        return f"linear weights are packed a second time: {num_bytes / 1e6:.0f} MB, made anew at every update"
    if policy.device.type != "cpu":
        return f"linear weights are not packed: that is for CPUs, and the policy is on {policy.device}"
    return (
        "linear weights are not packed: none is large enough, or in a type that this processor multiplies "
        "packed, or it was measured to gain nothing"
    )
