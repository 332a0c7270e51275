"""Checkpoints: an ordinary model folder, and beside it everything else the loop owns.

A checkpoint either is whole under its final name or does not exist: it is written under another name with a
manifest last, flushed to disk, and renamed. Before it is loaded every byte is compared with the manifest.
"""

import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from blockroll.errors import CheckpointError
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.manifest import check_manifest, flush, write_manifest

STATE_FILE = "trainer_state.pt"
COMPONENTS = (
    "step",
    "policy_version",
    "config",
    "learner",
    "rng",
    "counters",
    "extra",
    "unfinished",
    "audit",
)
UNFINISHED = ".unfinished-"
# What torch, safetensors and the file system say when a file cannot be written or read.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
READ_ERRORS = (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose files are what was written."""

    folder: Path
    step: int
    state: Mapping[str, Any]  # everything but the weights


def checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    found = (path for path in (run_dir / "checkpoints").glob("step_*") if path.is_dir())
    return sorted((path for path in found if re.fullmatch(r"step_\d+", path.name)), key=step_of)


def step_of(folder: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(folder.name.removeprefix("step_"))


def latest_checkpoint(run_dir: Path) -> Path:
    """The newest checkpoint; CheckpointError if there is none."""
    found = checkpoints(run_dir)
    if not found:
        raise CheckpointError(
            f"no checkpoint in {run_dir / 'checkpoints'}: start the run again under another name"
        )
    return found[-1]


def load_checkpoint(run_dir: Path, name: str | None = None) -> Checkpoint:
    """The newest checkpoint of a run, or the one called `name`, once all its bytes are checked.

    CheckpointError, in one line, names what is damaged and the newest checkpoint that is not.
    """
    folder = latest_checkpoint(run_dir) if name is None else _named(run_dir, name)
    try:
        return _load(folder)
    except CheckpointError as error:
        for other in reversed(checkpoints(run_dir)):
            if other != folder and _is_whole(other):
                advice = (
                    f"the newest good checkpoint is {other.name}: go on from it with "
                    f"blockroll train --resume {run_dir} --from {other.name}"
                )
                break
        else:
            advice = "no other checkpoint of the run is good: start the run again under another name"
        raise CheckpointError(f"{error}; {advice}") from None


def save_checkpoint(
    run_dir: Path,
    policy: HFPolicy,
    state: Mapping[str, Any],
    *,
    keep: int,
    write_others: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write the checkpoint of `state["step"]` and delete all but the `keep` newest.

    `write_others` writes further files into the folder that it is given.

    CheckpointError if that fails, or if a weight is not finite: what was saved before stays in force.
    """
    missing = [name for name in COMPONENTS if name not in state]
    assert not missing, f"the state to save lacks {missing}"
    folder = run_dir / "checkpoints"
    final = folder / f"step_{state['step']:06d}"
    _require_finite(final, policy, state)
    unfinished = folder / f"{UNFINISHED}{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(leftover)
        policy.save_pretrained(unfinished)
        torch.save(dict(state), unfinished / STATE_FILE)
        write_others(unfinished)
        write_manifest(unfinished, step=int(state["step"]))
        if final.exists():
            discard(final)
        unfinished.rename(final)
        flush(folder)
        for old in checkpoints(run_dir)[:-keep]:
            discard(old)
    except (*WRITE_ERRORS, CheckpointError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(
            f"could not write {final} ({_one_line(error)}); earlier checkpoints are untouched: make room, "
            f"then blockroll train --resume {run_dir}"
        ) from error
    return final


def discard(folder: Path) -> None:
    """Delete a checkpoint; whenever that is cut off, no part of it counts as one."""
    doomed = folder.with_name(f"{UNFINISHED}{folder.name}-discarded")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _named(run_dir: Path, name: str) -> Path:
    """The checkpoint called `step_000010`, `10`, or by its path."""
    last = Path(name).name
    found = checkpoints(run_dir)
    for folder in found:
        if last == folder.name or (last.isdigit() and int(last) == step_of(folder)):
            return folder
    there = ", ".join(folder.name for folder in found) or "none"
    raise CheckpointError(f"{run_dir} has no checkpoint {name!r}; there is {there}")


def _load(folder: Path) -> Checkpoint:
    step = step_of(folder)
    check_manifest(folder, step=step)
    path = folder / STATE_FILE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except READ_ERRORS as error:
        raise CheckpointError(f"{path} cannot be read ({_one_line(error)})") from error
    missing = [name for name in COMPONENTS if name not in state]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}")
    if state["step"] != step:
        raise CheckpointError(f"{path} is of step {state['step']}, and its folder's name says {step}")
    return Checkpoint(folder=folder, step=step, state=state)


def _is_whole(folder: Path) -> bool:
    try:
        _load(folder)
    except CheckpointError:
        return False
    return True


def _require_finite(final: Path, policy: HFPolicy, state: Mapping[str, Any]) -> None:
    """A run that goes on from NaN never recovers, so it is not saved over what could be resumed."""
    named = [*policy.model.named_parameters(), *_tensors("trainer_state", state)]
    for name, tensor in named:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{final} is not written, because {name} holds NaN or infinity; earlier checkpoints are "
                "untouched: go on from one of them with a smaller train.learning_rate"
            )


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a nested state, with where it stands."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _tensors(f"{name}.{key}", each)


def _one_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind."""
    return f"{error}".strip().partition("\n")[0] or type(error).__name__
