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
    adapter: str | None = None  # folder of a draft adapter; one beside the weights is used unasked
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # weights and forward, not samplers
    device: str = "auto"  # torch device; "auto" takes the accelerator if there is one


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """How rollouts are generated and by whom."""

    backend: Literal["ray", "local"] = "ray"  # replicas as Ray actors, or in this process
    # Of a TRL trainer, instead of `backend`: in each rank's process, or Ray actors on devices of their own.
    placement: Literal["colocated", "separate"] = "colocated"
    num_replicas: int = 2  # engines that share the requests
    threads_per_replica: int = 1  # torch threads of each Ray replica; cores are shared, so this is explicit
    gpus_per_replica: float = 1.0  # of each Ray replica on an accelerator; may be a fraction
    plan: str = (
        "two_forward"  # "auto" (each step chooses), or one for all: "plain", "two_forward(K)", "fused(K)"
    )
    max_batch_size: int = 64  # requests that one replica decodes together
    max_length: int = 0  # tokens of prompt and completion; 0: what the policy was built for
    memory_fraction: float = 0.3  # of the device's memory that keys and values may take, per replica
    temperature: float = 1.0  # 0 is greedy
    mix_weight: float = 1.0  # of the policy in the law: 1 is lossless, below 1 mixes draft rows in
    max_tokens: int = 64  # completion length at most
    top_k: int = 0  # best tokens that stay; 0 keeps all
    top_p: float = 1.0  # mass of the best tokens that stay; 1 keeps all
    min_p: float = 0.0  # share of the best token's probability that a token needs to stay
    repetition_penalty: float = 1.0  # divides logits of tokens in the text, multiplies negative ones
    presence_penalty: float = 0.0  # taken from the logits of tokens that the completion holds,
    frequency_penalty: float = 0.0  # and this for each time it does
    audit: Literal["off", "share", "all"] = "off"  # of which requests every token is recorded
    audit_share: float = 0.05  # of the requests, whole, chosen by a hash of their ids
    audit_dir: str = ""  # where; a run writes to its own folder unless this says otherwise

    def __post_init__(self) -> None:
        if not 0 < self.audit_share <= 1:
            raise ConfigError(f"audit_share must be above 0 and at most 1, got {self.audit_share}")
        if not 0 < self.memory_fraction <= 1:
            raise ConfigError(f"memory_fraction must be above 0 and at most 1, got {self.memory_fraction}")
        if not 0 <= self.mix_weight <= 1:
            raise ConfigError(f"mix_weight must be between 0 and 1, got {self.mix_weight}; 1 is lossless")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must be between 0 and 1, got {self.min_p}; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}; 1 keeps every token")
        if not self.repetition_penalty > 0:
            raise ConfigError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        _at_least(self, 0, "top_k")
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
    importance_sampling_correction: bool = True  # weigh tokens by old policy over behaviour law
    behavior_ratio_cap: float = 2.0  # truncation of those weights
    # Under top_k, top_p or min_p those weights average to the mass that is left, not to 1: ask by name.
    truncated_rollouts: Literal["refuse", "allow"] = "refuse"
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
class DraftConfig:
    """How a policy is taught to draft."""

    conversion: Literal["adapter", "full"] = (
        "adapter"  # an adapter beside the weights, or the weights themselves
    )
    rank: int = 32  # of the adapter's low-rank updates
    block_sizes: tuple[int, ...] = (8,)  # K to train; several share one adapter, turn about
    layouts: tuple[str, ...] = ("two_forward", "fused")  # what decoding may use, turn about
    loss: Literal["ce", "kl", "tv"] = "kl"  # against the policy's own causal law
    learning_rate: float = 1e-3  # AdamW
    warmup_steps: int = 10  # linear warm-up of the learning rate
    max_grad_norm: float = 1.0  # global gradient clip
    causal_weight: float = 1.0  # of the causal loss in a full conversion
    mask_token_id: int | None = None  # of a full conversion; None: the policy's or the tokenizer's own

    def __post_init__(self) -> None:
        _at_least(self, 1, "rank")
        _at_least(self, 0, "learning_rate", "warmup_steps")
        if not self.block_sizes or min(self.block_sizes) < 1:
            raise ConfigError(
                f"block_sizes must be one or more numbers of at least 1, got {self.block_sizes}"
            )
        unknown = [layout for layout in self.layouts if layout not in ("two_forward", "fused")]
        if unknown or not self.layouts:
            raise ConfigError(f"layouts must be of two_forward and fused, got {list(self.layouts)}")
        if self.conversion == "full" and not self.causal_weight > 0:
            raise ConfigError(
                f"causal_weight must be above 0 in a full conversion, got {self.causal_weight}: without the "
                "causal loss the policy is lost"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignmentConfig:
    """When drafts are taught, during RL, to follow the policy: draft steps on the rollouts of an update."""

    every: int = 1  # policy updates from one draft step to the next
    below: float = 0.0  # above 0, instead: only while acceptance is below this share of what it was at first
    steps: int = 1  # draft steps in a row
    draft: DraftConfig = field(default_factory=DraftConfig)

    def __post_init__(self) -> None:
        _at_least(self, 1, "every", "steps")
        if not 0 <= self.below <= 1:
            raise ConfigError(f"below must be between 0 and 1, got {self.below}; 0 leaves it to `every`")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertConfig:
    """One conversion: the policy answers prompts, the answers teach it to draft, again and again."""

    out: str  # folder for the adapter (for the whole policy, if `full`), its state and its metrics
    prompts: str = "arithmetic"  # a JSONL file with a `prompt` per line, text or messages; or a task
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # for prompts that are messages
    max_tokens: int = 1_000_000  # of the policy's own answers, in all
    max_minutes: float = 0  # wall time; 0: no limit
    prompts_per_round: int = 64  # answers of one round
    completion_tokens: int = 128  # of one answer at most
    temperature: float = 1.0  # of the answers and of both laws: what rollouts will use
    steps_per_round: int = 4  # optimizer steps that share one round's answers
    epochs_per_round: int = 2  # times that each answer is used, with other blocks every time
    num_replicas: int = 1  # that answer in parallel; more than one are Ray actors
    max_batch_size: int = 32  # answers that one replica decodes together
    patience: int = 8  # rounds without a better acceptance before it stops
    min_gain: float = 0.02  # tokens per step that count as better
    seed: int = 0  # every random choice derives from it
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_tokens", "prompts_per_round", "completion_tokens", "steps_per_round")
        _at_least(self, 1, "epochs_per_round", "num_replicas", "max_batch_size", "patience")
        _at_least(self, 0, "max_minutes", "min_gain", "temperature")
        if self.draft.conversion == "full" and self.temperature == 0:
            raise ConfigError(
                "a full conversion holds the policy to the law of its answers, which at temperature 0 is its "
                "best token alone; give a temperature above 0, or convert by adapter"
            )


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
    return from_mapping(RunConfig, with_overrides(values, overrides))


def with_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """The same nested values with overrides such as `train.steps=10` written over them."""
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
    return values


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
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a mapping, got {value!r}")
        return dict(value)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        item = typing.get_args(hint)[0]
        return tuple(_checked(item, entry, f"{where}[{i}]") for i, entry in enumerate(value))
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
