"""Every option of blockroll, as frozen dataclasses that import no torch.

One field is one line and one sentence. YAML files and `section.field=value` overrides build a
`RunConfig`; unknown keys and wrong types are errors that name the nearest key.
"""

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from blockroll.errors import ConfigError

T = typing.TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """The language model."""

    path: str = "tiny"  # a Hugging Face checkpoint folder, or "tiny" for the policy that ships with blockroll
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # weights and forward, not samplers
    device: str = "auto"  # torch device; "auto" takes the accelerator if there is one


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """How rollouts are generated and by whom."""

    backend: Literal["ray", "local"] = "ray"  # replicas as Ray actors, or in this process
    num_replicas: int = 2  # engines that share the requests
    threads_per_replica: int = 1  # torch threads of each Ray replica; cores are shared, so this is explicit
    gpus_per_replica: float = 1.0  # of each Ray replica on an accelerator; may be a fraction
    plan: str = (
        "two_forward"  # "auto" (each step chooses), or one for all: "plain", "two_forward(K)", "fused(K)"
    )
    max_batch_size: int = 64  # requests that one replica decodes together
    max_length: int = 0  # tokens of prompt and completion; 0: what the policy was built for
    temperature: float = 1.0  # 0 is greedy
    max_tokens: int = 64  # completion length at most

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_replicas", "threads_per_replica", "max_batch_size", "max_tokens")
        _at_least(self, 0, "max_length", "temperature")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One RL run: collect, advantages, update, publish."""

    algorithm: Literal["grpo"] = "grpo"  # which advantages and which loss
    steps: int = 45  # policy updates
    prompts_per_step: int = 64  # groups collected for one update
    group_size: int = 8  # rollouts per prompt
    learning_rate: float = 3e-4  # AdamW, at its highest
    lr_scheduler: Literal["linear", "constant"] = "linear"  # after the warm-up: down to 0 at the end, or flat
    warmup_steps: int = 2  # linear warm-up of the learning rate
    max_grad_norm: float = 1.0  # global gradient clip
    minibatches: int = 1  # optimizer steps per collected batch
    clip_epsilon: float = 0.2  # half-width of the ratio clip
    behavior_ratio_cap: float = 2.0  # truncation of old policy over behaviour law
    learner_threads: int = 2  # torch threads of the learner; replicas idle while it works
    eval_every: int = 10  # steps between evaluations; 0: never
    eval_prompts: int = 128  # held-out prompts of one evaluation
    checkpoint_every: int = 10  # steps between checkpoints; 0: only at the end
    keep_checkpoints: int = 2  # newest checkpoints kept

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "prompts_per_step", "minibatches", "learner_threads", "keep_checkpoints")
        _at_least(self, 2, "group_size")
        _at_least(self, 0, "eval_every", "eval_prompts", "checkpoint_every", "warmup_steps", "clip_epsilon")
        _at_least(self, 0, "learning_rate")
        _at_least(self, 1, "behavior_ratio_cap")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A whole run; what it resolved to is written into the run folder."""

    name: str = "run"  # the run's folder below `runs_dir`
    runs_dir: str = "runs"  # where run folders live
    seed: int = 0  # every random choice of the run derives from it
    task: str = "arithmetic"  # prompts and reward: "arithmetic", or a Python path "module:attribute"
    wandb: bool = False  # also log to Weights & Biases (WANDB_MODE=offline works)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def run_dir(self) -> Path:
        """The folder everything of this run is written to."""
        return Path(self.runs_dir) / self.name


def load_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a YAML file (or the defaults) and apply overrides such as `train.steps=10`."""
    values: dict[str, Any] = {}
    if path is not None:
        loaded = yaml.safe_load(Path(path).read_text())
        if loaded is not None and not isinstance(loaded, Mapping):
            raise ConfigError(f"{path} must hold a mapping of options, got {type(loaded).__name__}")
        values = dict(loaded or {})
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"an override is written section.field=value, got {override!r}")
        target = values
        *sections, leaf = key.strip().split(".")
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{section!r} in {override!r} is a value, not a section")
        target[leaf] = yaml.safe_load(text)
    return from_mapping(RunConfig, values)


def cache_dir() -> Path:
    """Where measurements are kept between processes: `BLOCKROLL_CACHE`, or a folder in the user's cache."""
    return Path(os.environ.get("BLOCKROLL_CACHE", "~/.cache/blockroll")).expanduser()


def to_mapping(config: Any) -> dict[str, Any]:
    """The config as plain values, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build a config dataclass from nested mappings; unknown keys and wrong types are errors."""
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(sorted(hints))}"
            raise ConfigError(f"unknown option {where + str(key)!r}; {advice}")
        arguments[key] = _checked(hints[key], value, where + str(key))
    return cls(**arguments)


def _checked(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is a section with options, got {value!r}")
        return from_mapping(typing.cast(type, hint), value, where + ".")
    origin = typing.get_origin(hint)
    if origin is Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            raise ConfigError(f"{where} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in typing.get_args(hint):
            return None
        (hint,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
    if hint is float and isinstance(value, str):
        try:  # YAML reads 1e-4 as text
            return float(value)
        except ValueError:
            raise ConfigError(f"{where} must be a number, got {value!r}") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {hint.__name__}, got {value!r}")
    return value


def _at_least(config: Any, low: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value >= low:
            raise ConfigError(f"{name} must be at least {low}, got {value}")
