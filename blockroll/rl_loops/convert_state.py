"""What a conversion keeps to go on: its config, where it stands, and the weights and moments of its trainer.

A conversion that is resumed is the one that was begun. Options that only say how far it goes, or on what it
runs, may change; any other is refused by name. Files are known by what they hold, so that they may move.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import pickle
import statistics
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from blockroll.config import ConvertConfig, by_path, from_mapping, to_mapping
from blockroll.errors import CheckpointError, ConfigError
from blockroll.policies.adapter import has_adapter, parent_hash
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.draft_trainer import DraftMetrics
from blockroll.rl_loops.tracking import truncate_lines

CONFIG_FILE = "convert.json"
STATE_FILE = "convert_state.pt"
METRICS_FILE = "convert.jsonl"
MAY_CHANGE = (  # on resume: how far it goes, and on what it runs
    "max_tokens",
    "max_minutes",
    "patience",
    "min_gain",
    "num_replicas",
    "max_batch_size",
    "policy.device",
    "policy.prepack",
    "policy.compile",
)
MAY_MOVE = ("out", "policy.path", "prompts")  # to another place, if they hold what they held
NOISE = 1.5  # standard errors that a rise must exceed: of twenty series some always rise by one


@dataclass(slots=True)
class Progressed:
    """Where a conversion stands; saved after every round."""

    round: int = 0
    num_tokens: int = 0
    minutes: float = 0.0
    scores: tuple[dict[str, float], ...] = ()  # of each round, by series; NaN: not met


@dataclass(frozen=True, slots=True, kw_only=True)
class KindMetrics:
    """What one round's answers, before they were trained on, say of one kind of block."""

    layout: str
    num_drafts: int
    acceptance_K: tuple[float, ...]  # by draft position, if it is reached; NaN: not met
    tokens_per_step: float  # expected of a whole block
    policy_kl: float  # nats per token, of a full conversion

    @property
    def name(self) -> str:
        """`two_forward(K)` or `fused(K)`."""
        return f"{self.layout}({self.num_drafts})"


def by_kind(fresh: Sequence[DraftMetrics]) -> list[KindMetrics]:
    """Means over the steps of each kind; layouts and block sizes are never averaged with each other."""
    kinds = sorted({(metrics.layout, metrics.num_drafts) for metrics in fresh})
    grouped = [(kind, [m for m in fresh if (m.layout, m.num_drafts) == kind]) for kind in kinds]
    return [
        KindMetrics(
            layout=layout,
            num_drafts=num_drafts,
            acceptance_K=tuple(
                _mean(values) for values in zip(*(m.acceptance_K for m in steps), strict=True)
            ),
            tokens_per_step=_mean([m.tokens_per_step for m in steps]),
            policy_kl=_mean([m.policy_kl for m in steps]),
        )
        for (layout, num_drafts), steps in grouped
    ]


def scores(kinds: Sequence[KindMetrics]) -> dict[str, float]:
    """Every figure that may still rise: tokens per step of each kind, acceptance at each of its positions."""
    found = {kind.name: kind.tokens_per_step for kind in kinds}
    for kind in kinds:
        for index, acceptance in enumerate(kind.acceptance_K):
            found[f"{kind.name} position {index + 1}"] = acceptance
    return found


def stop_reason(config: ConvertConfig, done: Progressed) -> str | None:
    """Why no further round follows, if none does: the budget is spent, or nothing rises any more."""
    if done.num_tokens >= config.max_tokens:
        return f"{done.num_tokens:,} tokens were used (max_tokens is {config.max_tokens:,})"
    if config.max_minutes and done.minutes >= config.max_minutes:
        return f"{done.minutes:.1f} minutes were used (max_minutes is {config.max_minutes:g})"
    names = list(dict.fromkeys(name for each in done.scores for name in each))
    rows = {name: [each.get(name, math.nan) for each in done.scores] for name in names}
    if len(done.scores) < 2 * config.patience or any(is_rising(config, rows[name]) for name in names):
        return None
    best = ", ".join(
        f"{name} at {_mean(rows[name][-config.patience :]):.2f} tokens per step"
        for name in names
        if "position" not in name
    )
    return (
        f"acceptance stopped rising: {best}, and no position of theirs rises (patience is {config.patience})"
    )


def is_rising(config: ConvertConfig, values: Sequence[float]) -> bool:
    """Whether the last `patience` rounds are better than as many before, by more than `min_gain` and chance.

    Chance is estimated from the differences of neighbouring rounds.
    """
    recent = [value for value in values[-config.patience :] if not math.isnan(value)]
    earlier = [value for value in values[-2 * config.patience : -config.patience] if not math.isnan(value)]
    if not recent or not earlier:
        return bool(recent)  # met for the first time
    met = [value for value in values if not math.isnan(value)]
    steps = [(after - before) ** 2 for before, after in itertools.pairwise(met)]
    variance = statistics.fmean(steps) / 2 if steps else 0.0
    error = math.sqrt(variance * (1 / len(recent) + 1 / len(earlier)))
    gain = statistics.fmean(recent) - statistics.fmean(earlier)
    return gain >= config.min_gain and gain > NOISE * error


def resolved(config: ConvertConfig) -> ConvertConfig:
    """The same, with paths that name the same files from any working folder."""
    policy = replace(
        config.policy,
        path=config.policy.path if config.policy.path == "tiny" else _absolute(config.policy.path),
        adapter=None if config.policy.adapter is None else _absolute(config.policy.adapter),
    )
    return replace(
        config,
        out=str(Path(config.out).expanduser().resolve()),
        prompts=_absolute(config.prompts),
        policy=policy,
    )


def load_convert_config(out: str | Path) -> ConvertConfig:
    """The config of a conversion that was begun: what `convert --resume` goes on with."""
    path = Path(out) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{out} holds no {CONFIG_FILE}: no conversion was begun there")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds {type(values).__name__}, not an object")
        config = from_mapping(ConvertConfig, {**values, "out": str(out)})
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): what was converted so far can still be used, but not gone on with"
        ) from error
    return resolved(config)


def check_resumed(config: ConvertConfig) -> None:
    """Refuse options that would make it another conversion; ConfigError names each, and both values."""
    given, begun = _options(config), _options(load_convert_config(config.out))
    changed = [name for name in begun if given.get(name) != begun[name]]
    refused = [name for name in changed if name not in (*MAY_CHANGE, *MAY_MOVE)]
    if refused:
        named = "; ".join(f"{name} is {given.get(name)!r}, begun with {begun[name]!r}" for name in refused)
        raise ConfigError(
            f"the conversion in {config.out} goes on as it was begun: {named}. "
            f"May change: {', '.join(MAY_CHANGE)}. For another conversion choose another folder"
        )


def fingerprint(config: ConvertConfig, policy: HFPolicy) -> dict[str, str]:
    """What the files hold that a conversion is begun with: by it they are known again in another place."""
    path = Path(config.prompts)
    prompts = (
        hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest() if path.is_file() else config.prompts
    )
    return {"policy.path": parent_hash(policy.model), "prompts": prompts}


def check_fingerprint(state: Mapping[str, Any], config: ConvertConfig, found: Mapping[str, str]) -> None:
    """CheckpointError if policy or prompts are others than at the start, wherever they lie."""
    for name, kept in state["fingerprint"].items():
        if found[name] != kept:
            given = _options(config)[name]
            raise CheckpointError(
                f"{name} {given!r} holds something else than when the conversion in {config.out} was begun: "
                "give what it was begun with, or choose another folder"
            )


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """What cannot be written is one error that says what is left."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"could not write to {out}: {error}; the rounds that are saved there are untouched: free some "
            f"space, then blockroll convert --resume {out}"
        ) from error


def save_config(config: ConvertConfig) -> None:
    """Write the config that a resumed conversion is compared with."""
    path = Path(config.out) / CONFIG_FILE
    partial = path.with_name(f"{CONFIG_FILE}.partial")
    partial.write_text(json.dumps(asdict(config), indent=2), encoding="utf-8")
    os.replace(partial, path)


def save_state(out: Path, trainer: Mapping[str, Any], done: Progressed, found: Mapping[str, str]) -> None:
    """Write the state to resume from, in one file, whole or not at all; OSError if there is no room."""
    partial = out / f"{STATE_FILE}.partial"
    try:
        torch.save({"trainer": trainer, "progress": asdict(done), "fingerprint": dict(found)}, partial)
    except RuntimeError as error:  # how torch reports a full disk
        raise OSError(str(error).splitlines()[0]) from error
    os.replace(partial, out / STATE_FILE)


def load_state(out: Path) -> dict[str, Any] | None:
    """What `save_state` wrote, None before the end of the first round; CheckpointError if it is damaged."""
    path = out / STATE_FILE
    if not path.is_file():
        if has_adapter(out) or (out / "config.json").is_file():
            raise CheckpointError(f"{out} has lost its {STATE_FILE}: {_ADVICE}")
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch does not compare checksums
        if broken is not None:
            raise ValueError(f"{broken} has another checksum")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        state["progress"] = Progressed(**state["progress"])
        missing = {"trainer", "fingerprint"} - state.keys()
        if missing or not all(isinstance(each, dict) for each in state["progress"].scores):
            raise ValueError("it was written by another version")
    except (
        OSError, RuntimeError, ValueError, TypeError, KeyError, EOFError,
        zipfile.BadZipFile, pickle.UnpicklingError,
    ) as error:  # fmt: skip
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is damaged ({first_line}): {_ADVICE}") from error
    return state


def cut_metrics(out: Path, done: Progressed) -> None:
    """Metrics of rounds that the state does not hold are measured again."""
    try:
        truncate_lines(out / METRICS_FILE, done.round, key="round")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{out / METRICS_FILE} is damaged ({error}): move it away to go on without what it says"
        ) from error


_ADVICE = (
    "the conversion cannot go on from here. What was converted so far can be used, and policy.adapter of a "
    "new conversion in another folder begins from it"
)


def _absolute(path: str) -> str:
    """Of a file or folder that is there; anything else is a name."""
    found = Path(path).expanduser()
    return str(found.resolve()) if found.exists() else path


def _options(config: ConvertConfig) -> dict[str, Any]:
    return by_path(ConvertConfig, to_mapping(config))


def _mean(values: Sequence[float]) -> float:
    """Over those that were met."""
    met = [value for value in values if not math.isnan(value)]
    return statistics.fmean(met) if met else math.nan
