"""Checkpoints: an ordinary model folder, and beside it everything else the loop owns.

A checkpoint either is whole under its final name or does not exist: it is written under another name,
flushed to disk, and renamed.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from blockroll.errors import CheckpointError
from blockroll.policies.hf import HFPolicy

STATE_FILE = "trainer_state.pt"
COMPONENTS = ("step", "policy_version", "config", "learner", "rng", "counters")
UNFINISHED = ".unfinished-"


def checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step_*") if path.is_dir())


def latest_checkpoint(run_dir: Path) -> Path:
    """The newest checkpoint; CheckpointError if there is none."""
    found = checkpoints(run_dir)
    if not found:
        raise CheckpointError(
            f"no checkpoint in {run_dir / 'checkpoints'}: start the run again under another name"
        )
    return found[-1]


def save_checkpoint(run_dir: Path, policy: HFPolicy, state: Mapping[str, Any], *, keep: int) -> Path:
    """Write the checkpoint of `state["step"]` and delete all but the `keep` newest."""
    missing = [name for name in COMPONENTS if name not in state]
    assert not missing, f"the state to save lacks {missing}"
    folder = run_dir / "checkpoints"
    final = folder / f"step_{state['step']:06d}"
    unfinished = folder / f"{UNFINISHED}{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(leftover)
        policy.save_pretrained(unfinished)
        torch.save(dict(state), unfinished / STATE_FILE)
        for path in (*unfinished.rglob("*"), unfinished):
            _flush(path)
        if final.exists():
            shutil.rmtree(final)
        unfinished.rename(final)
        _flush(folder)
        for old in checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(
            f"could not write {final}: {error}; earlier checkpoints are untouched, free some space and resume"
        ) from error
    return final


def load_trainer_state(folder: Path) -> dict[str, Any]:
    """Everything but the weights. A file or component that is missing or unreadable is named."""
    for name in ("config.json", STATE_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}: it is not a whole checkpoint, use another one")
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} lacks its weights (*.safetensors): use another checkpoint")
    try:
        state: dict[str, Any] = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{folder / STATE_FILE} cannot be read ({error}): use another checkpoint"
        ) from error
    missing = [name for name in COMPONENTS if name not in state]
    if missing:
        raise CheckpointError(f"{folder / STATE_FILE} lacks {', '.join(missing)}: use another checkpoint")
    return state


def _flush(path: Path) -> None:
    """Force a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
