"""What a bench decodes: its options, the workloads they span, and the requests of each."""

import itertools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from blockroll.errors import InvalidInput
from blockroll.rollout.engine.requests import derive_seed
from blockroll.types import Law, Request, Sampling

Prompts = Sequence[tuple[int, ...]]
TARGET = Law()
PromptSource = Literal["text", "random"]
WorkloadShape = Literal["even", "grouped", "skewed"]
# Lengths of skewed completions: of 400 at most, 3 at least, a median of 17 and a mean of about 47.
SHORTEST = 3
MEDIAN_SHARE = 17 / 400  # of the longest
SPREAD = 1.43  # standard deviation of the logarithm


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What every subject decodes side by side."""

    batch: int  # requests decoded together
    temperature: float  # 0 is greedy
    prompt_tokens: int | None  # exact length of every prompt; None: as long as each is
    max_tokens: int  # completion length at most


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure: every combination of the lists, each for every plan."""

    batches: tuple[int, ...] = (1, 8, 64)  # requests decoded together
    temperatures: tuple[float, ...] = (1.0,)  # 0 is greedy
    prompt_tokens: tuple[int | None, ...] = (None,)  # exact prompt lengths; None: as long as each is
    max_tokens: tuple[int, ...] = (64,)  # completion lengths at most
    mix_weights: tuple[float, ...] = (1.0,)  # of the laws; 1 is the target
    prompt_source: PromptSource = "text"  # "random": token ids drawn uniformly, which need a length
    ignore_eos: bool = False  # every completion has max_tokens tokens
    repeats: int = 5  # measured rounds of each workload
    rollouts: int = 8  # rollouts of one repeat at least; small batches take several waves
    queue: int = 1  # rollouts submitted together for each place in the batch
    shape: WorkloadShape = "even"
    siblings: int = 8  # grouped: rollouts of each prompt
    epochs: int = 2  # grouped: times that a repeat goes through its prompts
    seed: int = 0  # of requests, random prompts and skewed lengths

    def __post_init__(self) -> None:
        if min(self.repeats, self.rollouts, self.queue) < 1:
            raise InvalidInput(
                f"repeats, rollouts and queue must be at least 1, got {self.repeats}, {self.rollouts} and "
                f"{self.queue}"
            )
        if min(self.siblings, self.epochs) < 1:
            raise InvalidInput(
                f"siblings and epochs must be at least 1, got {self.siblings} and {self.epochs}"
            )
        if self.shape == "skewed" and min(self.max_tokens, default=SHORTEST) < SHORTEST:
            raise InvalidInput(
                f"skewed completions have {SHORTEST} tokens at least: give max_tokens of at least that, got "
                f"{list(self.max_tokens)}"
            )
        lengths = [length for length in self.prompt_tokens if length is not None]
        check_list("batch sizes", self.batches, counts=self.batches)
        check_list("prompt lengths", self.prompt_tokens, counts=lengths)
        check_list("max_tokens", self.max_tokens, counts=self.max_tokens)
        check_list("temperatures", self.temperatures)
        check_list("mix weights", self.mix_weights)
        for temperature in self.temperatures:
            Sampling(temperature=temperature)
        for weight in self.mix_weights:
            Law(weight)
        if self.prompt_source == "random" and None in self.prompt_tokens:
            raise InvalidInput("random prompts have no length of their own: give prompt_tokens, as in (128,)")

    def workloads(self) -> list[Workload]:
        """Every combination, batch sizes innermost."""
        spanned = itertools.product(self.temperatures, self.prompt_tokens, self.max_tokens, self.batches)
        return [
            Workload(batch=batch, temperature=temperature, prompt_tokens=prompt_tokens, max_tokens=max_tokens)
            for temperature, prompt_tokens, max_tokens, batch in spanned
        ]

    def prompts_in_words(self, prompt_tokens: int | None) -> str:
        """How prompts of a length are made, as every row says it."""
        if self.prompt_source == "random":
            return "random"
        return "text" if prompt_tokens is None else "text cut to length"

    def sampling(self, workload: Workload, law: Law) -> Sampling:
        """How every request of a workload is sampled, the longest of skewed ones."""
        return Sampling(
            temperature=workload.temperature,
            max_tokens=workload.max_tokens,
            ignore_eos=self.has_fixed_lengths,
            law=law,
        )

    @property
    def has_fixed_lengths(self) -> bool:
        """Whether every completion goes on to its `max_tokens`, as skewed ones do."""
        return self.ignore_eos or self.shape == "skewed"

    def groups(self, workload: Workload) -> int:
        """Grouped: prompts of one repeat, whose rollouts are enough for the batch and for `rollouts`."""
        return math.ceil(max(self.rollouts, workload.batch * self.queue) / self.siblings)


def make_waves(
    prompts: Prompts, workload: Workload, repeat: int, options: BenchOptions, *, law: Law = TARGET
) -> list[list[Request]]:
    """The requests of one repeat, in waves of `batch` times `queue`; prompts are taken in turn.

    Grouped, a wave is an epoch: all siblings of all prompts of the repeat, those of a prompt side by side.
    Skewed, each request ends at a length of its own. Equal arguments give equal requests; other laws differ
    in nothing but the law. No seed serves twice.
    """
    if options.shape == "grouped":
        return _grouped(prompts, workload, repeat, options, law=law)
    size, sampling = workload.batch * options.queue, options.sampling(workload, law)
    num_waves = math.ceil(options.rollouts / size)
    first = repeat * num_waves * size
    return [
        [
            Request(
                request_id=f"bench-{index}",
                prompt_ids=prompts[index % len(prompts)],
                seed=options.seed * 1_000_003 + index,
                sampling=_skewed(sampling, index, options) if options.shape == "skewed" else sampling,
            )
            for index in range(first + wave * size, first + (wave + 1) * size)
        ]
        for wave in range(num_waves)
    ]


def warm_up_wave(prompts: Prompts, workload: Workload, options: BenchOptions, *, law: Law) -> list[Request]:
    """Requests that fill the batch and that no repeat measures.

    Who remembers texts would know the answers to requests that are measured.
    """
    wave = make_waves(prompts, workload, options.repeats, options, law=law)[0]
    return wave[: workload.batch] if options.shape == "grouped" else wave


def cut_to_length(prompts: Prompts, length: int) -> list[tuple[int, ...]]:
    """Each prompt behind those before it, in a circle, of which the last `length` tokens are kept.

    So every prompt ends as a whole prompt does, and long ones do not say the same thing over and over.
    """
    return [_tokens_up_to(prompts, index, length) for index in range(len(prompts))]


def random_prompts(
    count: int, length: int, *, allowed_ids: Iterable[int], seed: int
) -> list[tuple[int, ...]]:
    """Token ids drawn uniformly from the allowed ones: what a policy has no idea of."""
    generator = random.Random(derive_seed("bench prompts", seed, length))
    allowed = tuple(allowed_ids)
    return [tuple(generator.choices(allowed, k=length)) for _ in range(count)]


def _grouped(
    prompts: Prompts, workload: Workload, repeat: int, options: BenchOptions, *, law: Law
) -> list[list[Request]]:
    num_groups, sampling = options.groups(workload), options.sampling(workload, law)
    per_epoch = num_groups * options.siblings
    waves = []
    for epoch in range(options.epochs):
        first = (repeat * options.epochs + epoch) * per_epoch
        waves.append(
            [
                Request(
                    request_id=f"bench-{first + index}",
                    prompt_ids=prompts[(repeat * num_groups + index // options.siblings) % len(prompts)],
                    seed=options.seed * 1_000_003 + first + index,
                    sampling=sampling,
                    group_id=f"bench-{repeat}-{epoch}-{index // options.siblings}",
                )
                for index in range(per_epoch)
            ]
        )
    return waves


def _skewed(longest: Sampling, index: int, options: BenchOptions) -> Sampling:
    """Log-normal, between the shortest and the longest."""
    draw = random.Random(derive_seed("bench lengths", options.seed, index)).gauss(0.0, SPREAD)
    length = round(longest.max_tokens * MEDIAN_SHARE * math.exp(draw))
    return replace(longest, max_tokens=min(max(length, SHORTEST), longest.max_tokens))


def _tokens_up_to(prompts: Prompts, index: int, length: int) -> tuple[int, ...]:
    tokens: tuple[int, ...] = ()
    while len(tokens) < length:
        tokens = (*prompts[index % len(prompts)], *tokens)
        index -= 1
    return tokens[-length:]


def check_list(name: str, values: Sequence[float | None], *, counts: Sequence[int] = ()) -> None:
    """A list of options holds something, nothing twice, and counts of at least 1."""
    if not values or min(counts, default=1) < 1:
        raise InvalidInput(f"{name} must be at least 1 and one or more of them, got {list(values)}")
    if len(set(values)) < len(values):
        raise InvalidInput(f"each of the {name} is measured once, got {list(values)}")


def check_length(prompts: Prompts, max_tokens: int, max_length: int) -> None:
    """InvalidInput if a prompt and its completion may become longer than a policy was built for."""
    longest = max(map(len, prompts))
    if longest + max_tokens > max_length:
        room = max_length - longest
        advice = f"give max_tokens of at most {room}" if room > 0 else "give shorter prompts"
        raise InvalidInput(
            f"prompt and completion take {longest + max_tokens} tokens, but the policy was built for "
            f"{max_length}; {advice}"
        )
