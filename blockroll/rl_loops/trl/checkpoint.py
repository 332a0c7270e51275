"""`checkpoint-N/blockroll/`: what a trainer's own checkpoint does not hold of its rollouts.

The draft adapter as an ordinary folder, the optimizer of its alignment, what the planner has counted, and the
policy version, and the sums of metrics that go on over the run.
"""

from pathlib import Path
from typing import Any

import torch

from blockroll.errors import CheckpointError
from blockroll.rl_loops.trl.placement import Placement
from blockroll.rollout.audit.files import drop_audit

FOLDER, STATE_FILE = "blockroll", "rollout_state.pt"


def save_rollout_state(
    checkpoint: Path, placement: Placement, *, version: int, views: dict[str, Any]
) -> None:
    """Write the folder into a trainer's checkpoint. Rank 0 calls it."""
    folder = checkpoint / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {"policy_version": version, "views": views}
    if placement.policy is not None and placement.policy.adapter is not None:
        placement.policy.adapter.save_pretrained(folder)
    if placement.planner is not None:
        state["planner"] = placement.planner.state_dict()
    if placement.alignment is not None:
        state["alignment"] = placement.alignment.state_dict()
    partial = folder / f"{STATE_FILE}.partial"
    torch.save(state, partial)
    partial.replace(folder / STATE_FILE)


def load_rollout_state(
    checkpoint: Path, placement: Placement, *, audit: Path | None = None
) -> tuple[int, dict[str, Any]]:
    """Go on from a trainer's checkpoint; CheckpointError if alignment has nothing to go on from.

    Gives the policy version that it was written at, -1 if no blockroll wrote it, for what is drawn now is
    later; and the states of the learner's views, by mode.

    Of `audit`, the folder that the run writes to, rows of later versions go: those versions are made again.
    """
    path = checkpoint / FOLDER / STATE_FILE
    if not path.is_file():
        if placement.alignment is None:
            return -1, {}  # a stock trainer's checkpoint: its policy is all there is to go on from
        raise CheckpointError(
            f"{checkpoint} has no {FOLDER}/{STATE_FILE}: it was written without blockroll, and alignment "
            "cannot go on from it; resume with alignment=None"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    if placement.alignment is not None:
        if "alignment" not in state:
            raise CheckpointError(f"{path} was written without alignment; start with alignment=None")
        placement.alignment.load_state_dict(state["alignment"])
    if audit is not None and audit.is_dir():
        drop_audit(audit, state["policy_version"])
    if placement.planner is not None and "planner" in state:
        placement.planner.load_state_dict(state["planner"])
    return int(state["policy_version"]), state.get("views", {})
