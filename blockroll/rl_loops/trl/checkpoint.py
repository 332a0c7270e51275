"""`checkpoint-N/blockroll/`: what a trainer's own checkpoint does not hold of its rollouts.

The draft adapter as an ordinary folder, the optimizer of its alignment, what the planner has counted, the
policy version, the guard's evidence, and the sums of metrics that go on over the run. And the histories that
drafts are looked up in: a file of each replica, so where each rank has its own, one of each rank.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from blockroll.errors import CheckpointError
from blockroll.rl_loops.trl.guard import GuardCallback
from blockroll.rl_loops.trl.metrics import LearnersView
from blockroll.rl_loops.trl.placement import Placement
from blockroll.rl_loops.trl.together import together
from blockroll.rollout.audit.files import drop_audit

log = logging.getLogger(__name__)

FOLDER, STATE_FILE = "blockroll", "rollout_state.pt"


def save_rollout_state(
    trainer: Any, checkpoint: Path, *, views: dict[str, Any], guard: GuardCallback | None
) -> None:
    """Write the folder into a trainer's checkpoint. All ranks call it; each writes its own histories.

    CheckpointError where a history cannot be written.
    """
    placement, folder = trainer.rollouts.placement, checkpoint / FOLDER
    with together(trainer.accelerator, "writing a checkpoint"):
        folder.mkdir(parents=True, exist_ok=True)
        placement.pool.save_history(folder, first=_first_history(trainer))
        if trainer.args.should_save:
            state = {"policy_version": trainer.rollouts.version, "views": views}
            _save_state(folder, placement, {**state, **({"guard": guard.state_dict()} if guard else {})})


def load_rollout_state(
    trainer: Any,
    checkpoint: Path,
    *,
    views: Mapping[str, LearnersView],
    audit: Path | None,
    guard: GuardCallback | None,
) -> None:
    """Go on from a trainer's checkpoint; CheckpointError if alignment has nothing to go on from, or if the
    guard was one of other tests.

    What is drawn now is of a later policy version than the one that it was written at.

    Histories without a file begin empty, and the log says so; of fewer files than ranks, several ranks take
    one. CheckpointError for one that is not as it was written, InvalidInput for one of another vocabulary.

    Of `audit`, the folder that the run writes to, rows of later versions go: those versions are made again.
    All ranks call it.
    """
    with together(trainer.accelerator, "going on from a checkpoint"):
        placement = trainer.rollouts.placement
        state = _load_state(checkpoint, placement)
        placement.pool.load_history(checkpoint / FOLDER, first=_first_history(trainer))
        if guard is not None:
            guard.load_state_dict(None if state is None else state.get("guard"))
        elif state is not None and "guard" in state and trainer.accelerator.is_main_process:
            log.warning("%s has a guard, and this trainer has none: nothing is tested any more", checkpoint)
        if state is not None:
            version = int(state["policy_version"])
            trainer.rollouts.begin_version(after=version)
            for mode, sums in state.get("views", {}).items():
                views[mode].load_state_dict(sums)
            if trainer.accelerator.is_main_process and audit is not None and audit.is_dir():
                drop_audit(audit, version)


def _first_history(trainer: Any) -> int:
    """The number of the history of a rank's first replica; replicas that ranks share are rank 0's."""
    return int(trainer.accelerator.process_index * len(trainer.rollouts.placement.pool.states))


def _save_state(folder: Path, placement: Placement, state: dict[str, Any]) -> None:
    if placement.policy is not None and placement.policy.adapter is not None:
        placement.policy.adapter.save_pretrained(folder)
    if placement.planner is not None:
        state["planner"] = placement.planner.state_dict()
    if placement.alignment is not None:
        state["alignment"] = placement.alignment.state_dict()
    partial = folder / f"{STATE_FILE}.partial"
    torch.save(state, partial)
    partial.replace(folder / STATE_FILE)


def _load_state(checkpoint: Path, placement: Placement) -> dict[str, Any] | None:
    """What `_save_state` wrote; None of a stock trainer's checkpoint, whose policy is all that it has."""
    path = checkpoint / FOLDER / STATE_FILE
    if not path.is_file():
        if placement.alignment is None:
            return None
        raise CheckpointError(
            f"{checkpoint} has no {FOLDER}/{STATE_FILE}: it was written without blockroll, and alignment "
            "cannot go on from it; resume with alignment=None"
        )
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if placement.alignment is not None:
        if "alignment" not in state:
            raise CheckpointError(f"{path} was written without alignment; start with alignment=None")
        placement.alignment.load_state_dict(state["alignment"])
    if placement.planner is not None and "planner" in state:
        placement.planner.load_state_dict(state["planner"])
    return state
