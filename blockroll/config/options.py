"""Every option of blockroll: one field is one line, its bounds and one sentence."""

import os
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, assert_never

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import BeforeValidator, Strict

from blockroll.config.checks import options
from blockroll.errors import ConfigError
from blockroll.types.bounds import hints_of
from blockroll.types.plan import HISTORY, MAX_DRAFTS, Law, Plan
from blockroll.types.sampling import Sampling, SamplingOptions


def _path_text(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


T = TypeVar("T")
PathText = Annotated[str, BeforeValidator(_path_text)]  # a `Path` will do
Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
NumDrafts = Annotated[int, Ge(1), Le(MAX_DRAFTS)]
Amount = Annotated[float, Ge(0)]
Share = Annotated[float, Gt(0), Le(1)]
Weight = Annotated[float, Ge(0), Le(1)]
Alpha = Annotated[float, Gt(0), Le(0.5)]
GuardAction = Literal["off", "warn", "lossless", "plain", "stop"]
Backend = Literal["ray", "local"]  # kinds of replica: Ray actors, or in this process
Port = Annotated[int, Ge(0), Le(65535)]
PageSize = Annotated[int, Ge(1), Le(1024)]
Several = Annotated[tuple[T, ...], MinLen(1), Strict(False)]


@options
class PolicyConfig:
    """The language model."""

    path: PathText = (
        "tiny"  # a checkpoint folder, an id of the Hugging Face Hub, or "tiny" for the one that ships
    )
    adapter: PathText | None = None  # folder of a draft adapter; one beside the weights is used unasked
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # weights and forward, not samplers
    device: str = "auto"  # torch device; "auto" takes the accelerator if there is one
    # Decoding on a CPU with copies of the linear weights in the layout it multiplies fastest, which take as
    # much memory again: "auto" where that is measured to be faster.
    prepack: Literal["auto", "on", "off"] = "auto"
    # Decoding on a CPU by compiled layers, which read the weights where they lie: "auto" where there is a C
    # compiler, the law is the same, and it is measured to be faster.
    compile: Literal["auto", "on", "off"] = "auto"


@options
class RolloutConfig(SamplingOptions):
    """How rollouts are generated and by whom."""

    # Replicas as Ray actors, or in this process; None: as `placement` says, or Ray actors.
    backend: Backend | None = None
    # Of a TRL trainer: replicas in each rank's process, or Ray actors on devices of their own; None: as
    # `backend` says, or in each rank's process.
    placement: Literal["colocated", "separate"] | None = None
    num_replicas: Positive = 2  # engines that share the requests
    threads_per_replica: Positive = 1  # torch threads of each Ray replica; cores are shared: be explicit
    gpus_per_replica: Amount = 1.0  # of each Ray replica on an accelerator; may be a fraction
    plan: str = (
        "auto"  # each step chooses; or one for all: "plain", "two_forward(K)", "fused(K)", "history(K)"
    )
    # Whether "auto" chooses only plans whose texts are those of plain decoding: history, and mask rows where
    # the temperature is 0. A fixed plan repeats itself.
    reproducible: bool = False
    # Tokens of earlier texts, in which each replica looks drafts up; 0: none, and `auto` does without them.
    history_tokens: Count = 1 << 20
    share_history: bool = False  # whether replicas look drafts up in each other's finished texts too
    # In which order a call's rollouts begin whose prompts are new to the pool: groups side by side, or the
    # first sibling of every group, then the second, so that later ones are drafted from finished ones.
    group_order: Literal["together", "sibling_by_sibling"] = "together"
    max_batch_size: Positive = 64  # requests that one replica decodes together
    # Prompt tokens that are computed at once while requests run, so that a long prompt does not stall them.
    prefill_chunk: Positive = 2048
    max_length: Count = 0  # tokens of prompt and completion; 0: what the policy was built for
    # Of the device's memory that keys and values may take, per replica, as far as it is free behind the
    # weights; on a CPU, of the machine's or of what its process may have.
    memory_fraction: Share = 0.3
    max_cache_rows: Count = 0  # tokens with keys and values, per replica; 0: as memory_fraction says
    # How keys and values lie in memory: in slots as long as the longest text, or in pages, taken as texts
    # grow; "auto": slots on a CPU, pages elsewhere.
    cache: Literal["auto", "slots", "pages"] = "auto"
    page_size: PageSize = 16  # rows of a page, a power of two
    # Whether forwards over pages are captured as graphs, in few shapes; "auto": on a GPU. "buckets": the same
    # shapes without graphs, anywhere.
    graphs: Literal["auto", "on", "off", "buckets"] = "auto"
    # Whether a step is queued before the one before is read, so that a device never waits for the host;
    # "auto": where it runs behind the host and the cache is in pages.
    overlap: Literal["auto", "on", "off"] = "auto"
    # Which form of attention, cache, sampler and learner's log-probabilities runs: definitions in torch, or
    # Triton's kernels; "auto": Triton's on a GPU; where it cannot run, log and `blockroll doctor` say why.
    kernels: Literal["auto", "reference", "triton"] = "auto"
    mix_weight: Weight = 1.0  # of the policy in the law: 1 is lossless, below 1 mixes draft rows in
    max_tokens: Positive = 64  # completion length at most
    # Of a TRL trainer: at which weights the generating policy's law is compared with the trained one's.
    check_sync: Literal["off", "first", "every"] = "first"  # "first": as they begin, and once they have moved
    check_finite_weights: bool = True  # whether an update with NaN or infinity in it is refused
    # Of so many decoding steps one is looked at: whether its tokens follow the laws that are stated for them.
    # 0: none; None: 32 where a guard reads what is seen, else none.
    watch_every: Count | None = None
    audit: Literal["off", "share", "all"] = "off"  # of which requests every token is recorded
    audit_share: Share = 0.05  # of the requests, whole, chosen by a hash of their ids
    audit_dir: PathText = ""  # where; a run writes to its own folder unless this says otherwise

    def __post_init__(self) -> None:
        if self.page_size & (self.page_size - 1):
            lower = 1 << (self.page_size.bit_length() - 1)
            raise ConfigError(
                f"page_size is {self.page_size}, and must be a power of two: {lower} or {2 * lower}"
            )
        if self.share_history and not self.history_tokens:
            raise ConfigError("share_history=True shares nothing where history_tokens is 0: leave one out")
        if self.plan.strip() != "auto":
            plan = Plan.parse(self.plan, default_drafts=1)  # how many a policy drafts, it says itself
            if plan.drafter == HISTORY and not self.history_tokens:
                raise ConfigError(
                    f"plan {plan.name} looks drafts up in earlier texts, and history_tokens is 0: give the "
                    "number of tokens that are kept, or another plan"
                )
        elif self.reproducible and self.mix_weight < 1:
            raise ConfigError(
                f"plan 'auto' with reproducible=True never mixes, and mix_weight is {self.mix_weight}: what "
                "is mixed depends on the plan; fix the plan, or leave the law unmixed"
            )

    @property
    def replica_kind(self) -> Backend:
        """What the replicas of a pool are, which is not what those of a TRL trainer are."""
        return self.backend or ("local" if self.placement == "colocated" else "ray")

    @property
    def is_separate(self) -> bool:
        """Whether the replicas of a TRL trainer are Ray actors on devices of their own."""
        match self.placement or self.backend:
            case "separate" | "ray":
                return True
            case "colocated" | "local" | None:
                return False
            case other:
                assert_never(other)

    def sampling(self, **others: Any) -> Sampling:
        """What these options ask of a request; `others` are options of `Sampling` that no config has."""
        values = {name: getattr(self, name) for name in hints_of(SamplingOptions)}
        return Sampling(**{"law": Law(self.mix_weight), **values, **others})


@options
class TrainConfig:
    """One RL run: collect, advantages, update, publish."""

    algorithm: Literal["grpo"] = "grpo"  # which advantages and which loss
    steps: Positive = 45  # policy updates
    prompts_per_step: Positive = 64  # groups collected for one update
    group_size: Annotated[int, Ge(2)] = 8  # rollouts per prompt
    learning_rate: Amount = 3e-4  # AdamW, at its highest
    lr_scheduler: Literal["linear", "constant"] = "linear"  # after the warm-up: down to 0 at the end, or flat
    warmup_steps: Count = 2  # linear warm-up of the learning rate
    max_grad_norm: Amount = 1.0  # global gradient clip
    minibatches: Positive = 1  # optimizer steps per collected batch
    clip_epsilon: Amount = 0.2  # half-width of the ratio clip
    importance_sampling_correction: bool = True  # weigh tokens by old policy over behaviour law
    behavior_ratio_cap: Annotated[float, Ge(1)] = 2.0  # truncation of those weights
    # Under top_k, top_p or min_p those weights average to the mass that is left, not to 1: ask by name.
    truncated_rollouts: Literal["refuse", "allow"] = "refuse"
    learner_threads: Positive = 2  # torch threads of the learner; replicas idle while it works
    logits_memory_mb: Positive = (
        256  # that the learner's logits may take at once; longer batches go in pieces
    )
    # Prompts that leave the context no room: other rows in their place, their last tokens, or no run at all.
    overlong_prompts: Literal["skip", "truncate", "error"] = "skip"
    eval_every: Count = 10  # steps between evaluations; 0: never
    eval_prompts: Count = 128  # held-out prompts of one evaluation
    checkpoint_every: Count = 10  # steps between checkpoints; 0: only at the end
    keep_checkpoints: Positive = 2  # newest checkpoints kept


@options
class DraftConfig:
    """How a policy is taught to draft."""

    conversion: Literal["adapter", "full"] = (
        "adapter"  # an adapter beside the weights, or the weights themselves
    )
    rank: Positive = 32  # of the adapter's low-rank updates
    block_sizes: Several[NumDrafts] = (8,)  # K to train; several share one adapter, turn about
    layouts: Several[Literal["two_forward", "fused"]] = (
        "two_forward",
        "fused",
    )  # what decoding may use, turn about
    loss: Literal["ce", "kl", "tv"] = "kl"  # against the policy's own causal law
    learning_rate: Amount = 1e-3  # AdamW
    warmup_steps: Count = 10  # linear warm-up of the learning rate
    max_grad_norm: Amount = 1.0  # global gradient clip
    causal_weight: Amount = 1.0  # of the causal loss in a full conversion
    mask_token_id: int | None = None  # of a full conversion; None: the policy's or the tokenizer's own

    def __post_init__(self) -> None:
        if self.conversion == "full" and not self.causal_weight > 0:
            raise ConfigError(
                f"causal_weight must be above 0 in a full conversion, got {self.causal_weight}: without the "
                "causal loss the policy is lost"
            )


@options
class AlignmentConfig:
    """When drafts are taught, during RL, to follow the policy: draft steps on the rollouts of an update."""

    every: Positive = 1  # policy updates from one draft step to the next
    below: Weight = 0.0  # above 0, instead: only while acceptance is below this share of its first value
    steps: Positive = 1  # draft steps in a row
    draft: DraftConfig = field(default_factory=DraftConfig)


@options
class ConvertConfig:
    """One conversion: the policy answers prompts, the answers teach it to draft, again and again."""

    out: PathText  # folder for the adapter (for the whole policy, if `full`), its state and its metrics
    prompts: PathText = "arithmetic"  # a JSONL file with a `prompt` per line, text or messages; or a task
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # for prompts that are messages
    max_tokens: Positive = 1_000_000  # of the policy's own answers, in all
    max_minutes: Amount = 0  # wall time; 0: no limit
    prompts_per_round: Positive = 64  # answers of one round
    completion_tokens: Positive = 128  # of one answer at most
    temperature: Amount = 1.0  # of the answers and of both laws: what rollouts will use
    steps_per_round: Positive = 4  # optimizer steps that share one round's answers
    epochs_per_round: Positive = 2  # times that each answer is used, with other blocks every time
    num_replicas: Positive = 1  # that answer in parallel; more than one are Ray actors
    max_batch_size: Positive = 32  # answers that one replica decodes together
    patience: Positive = 8  # rounds without a better acceptance before it stops
    min_gain: Amount = 0.02  # tokens per step that count as better
    seed: int = 0  # every random choice derives from it
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)

    def __post_init__(self) -> None:
        if self.draft.conversion == "full" and self.temperature == 0:
            raise ConfigError(
                "a full conversion holds the policy to the law of its answers, which at temperature 0 is its "
                "best token alone; give a temperature above 0, or convert by adapter"
            )


@options
class WatchConfig:
    """What is tested after every step of a run, and what is done once a test has spoken.

    Actions: "off", "warn", "lossless" (rollouts are the policy from the next step on), "plain" (and decoded
    without drafts), "stop". An alpha is the chance, over a whole run, that its test speaks without cause.
    """

    calibration: GuardAction = "stop"  # if tokens do not follow the laws that are stated for them: a fault
    calibration_alpha: Alpha = 1e-6  # of each of its tests
    learner: GuardAction = "warn"  # if the learner finds other log-probabilities than replicas reported
    learner_alpha: Alpha = 1e-6
    learner_tolerance: Amount = 0.0  # nats a token, on average; 0: 0.005 in float32, 0.05 in less
    acceptance: GuardAction = "warn"  # if acceptance leaves what it was in the first rollouts
    acceptance_alpha: Alpha = 0.01
    acceptance_reference: Positive = 512  # rollouts that it is held against
    acceptance_tolerance: Weight = 0.05  # by which it may lie beside what these leave open
    # If rollouts under a mixed law earn less than lossless ones of the same prompts; needs a shadow share.
    reward: GuardAction = "off"
    reward_alpha: Alpha = 0.05
    reward_tolerance: Weight = 0.01  # a loss that is none, as a share of what lies between these bounds:
    reward_low: float = 0.0  # rewards below count as this, those that failed too
    reward_high: float = 1.0
    shadow_share: Weight = 0.0  # of the prompts, that are answered under the other law too
    shadow_trains: bool = False  # whether these rollouts are learned from as well, under their own law
    alpha_budget: Alpha = 0.1  # that all alphas may sum to
    # Whether a fallback is for good, ended by hand (`guard.lift`, `train --lift-guard`), or also by shadow
    # pairs that show no loss. The second and third ask half of each alpha of the first attempt.
    lift: Literal["never", "by_hand", "evidence"] = "by_hand"

    def __post_init__(self) -> None:
        if self.reward != "off" and not self.shadow_share:
            raise ConfigError(
                f"watch.reward is {self.reward!r}, which compares rollouts under two laws, and "
                "watch.shadow_share is 0: give the share of prompts that are answered under both, as 0.1, or "
                "leave watch.reward off"
            )
        if not self.reward_low < self.reward_high:
            raise ConfigError(
                f"watch.reward_low must be below watch.reward_high, got {self.reward_low} and "
                f"{self.reward_high}; they bound what a reward can be"
            )


@options
class RunConfig:
    """A whole run; what it resolved to is written into the run folder."""

    name: str = "run"  # the run's folder below `runs_dir`
    runs_dir: PathText = "runs"  # where run folders live
    seed: int = 0  # every random choice of the run derives from it
    task: str = "arithmetic"  # prompts and reward: "arithmetic", or a Python path "module:attribute"
    wandb: bool = False  # also log to Weights & Biases (WANDB_MODE=offline works)
    metrics_port: Port = 0  # where Prometheus fetches the metrics of the newest step; 0: nowhere
    metrics_host: str = "127.0.0.1"  # of that port: this machine alone; "0.0.0.0" for any that reaches it
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        if self.watch.shadow_share and self.rollout.mix_weight == 1:
            raise ConfigError(
                "watch.shadow_share answers prompts under the lossless law beside the one in use, and "
                "rollout.mix_weight is 1: both are the same; leave one out"
            )
        path = Path(self.name)
        if not path.parts or path.is_absolute() or ".." in path.parts or not self.name.isprintable():
            raise ConfigError(
                f"name must be that of a folder below runs_dir, got {self.name!r}; another place for runs is "
                "runs_dir=FOLDER"
            )

    @property
    def run_dir(self) -> Path:
        """The folder everything of this run is written to."""
        return Path(self.runs_dir) / self.name


def cache_dir() -> Path:
    """Where measurements are kept between processes: `BLOCKROLL_CACHE`, or a folder in the user's cache."""
    return Path(os.environ.get("BLOCKROLL_CACHE", "~/.cache/blockroll")).expanduser()
