"""What transformers offers by itself, to measure and compare against: stock attention, caches and samplers.

Three ways: `generate` of one left-padded batch, `generate` assisted by prompt lookup, and continuous
batching. All of them draw from softmax(logits / temperature) over the full vocabulary, or take the argmax at
temperature 0. A model must be one of its own (`load_model`), not one that a policy has taken over.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

LOOKUP_TOKENS = 10  # drafts per step of prompt lookup, as in transformers' own examples
NO_END = -1  # continuous batching's word for "no end token"; None would mean the model's own
PAGE_TOKENS = 256  # of continuous batching's cache, by default
MOST_TOKENS_AT_ONCE = 8192  # of one forward of continuous batching, by default
PATIENCE_S = 30.0  # to wait for continuous batching's thread to end


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceTask:
    """What a reference is set up to decode."""

    batch: int  # prompts at once, at most
    longest_prompt: int  # tokens
    max_tokens: int  # completion length at most
    temperature: float  # 0 is greedy
    eos_token_ids: tuple[int, ...]  # none: every completion has `max_tokens` tokens

    def most_tokens(
        self, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int] | None
    ) -> Sequence[int]:
        """Of each prompt's completion."""
        return [self.max_tokens] * len(prompts) if max_tokens is None else max_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished completion; an end token is kept."""

    index: int  # of its prompt
    token_ids: list[int]


class Reference(Protocol):
    """One way to decode that is not blockroll's."""

    @property
    def version(self) -> str | None:
        """Of what decodes; None: the versions of this process say it."""
        ...

    def complete(
        self, prompts: Sequence[Sequence[int]], *, seed: int, max_tokens: Sequence[int] | None = None
    ) -> Iterator[Completion]:
        """Decode all prompts together; each completion comes when its caller would get it.

        `max_tokens` bounds each completion; None: the task's, for all.
        """
        ...

    def cpu_s(self) -> float:
        """Processor time spent so far, in seconds, by all threads and processes that decode."""
        ...

    def close(self) -> None:
        """Free what decoding needed."""
        ...


class GenerateReference:
    """`generate`: completions come when the longest of the batch has ended.

    With `lookup_tokens` it is assisted: as many tokens per step are drafted by looking up the last few in the
    text so far, and verified by rejection sampling. transformers does that one prompt at a time and raises a
    ValueError for more.
    """

    version = None

    def __init__(self, model: PreTrainedModel, task: ReferenceTask, *, lookup_tokens: int = 0) -> None:
        self._model = model
        self._task = task
        self._lookup_tokens = lookup_tokens

    def complete(
        self, prompts: Sequence[Sequence[int]], *, seed: int, max_tokens: Sequence[int] | None = None
    ) -> Iterator[Completion]:
        """Decode left-padded batches, one after the other, each as far as the longest of it may go."""
        most = self._task.most_tokens(prompts, max_tokens)
        for start in range(0, len(prompts), self._task.batch):
            completions = generate_stock(
                self._model,
                prompts[start : start + self._task.batch],
                max_tokens=max(most[start : start + self._task.batch]),
                temperature=self._task.temperature,
                eos_token_ids=self._task.eos_token_ids,
                seed=seed + start,
                lookup_tokens=self._lookup_tokens,
            )
            for index, token_ids in enumerate(completions, start=start):
                yield Completion(index=index, token_ids=token_ids[: most[index]])

    def cpu_s(self) -> float:
        """Of this process."""
        return time.process_time()

    def close(self) -> None:
        """Nothing is kept."""


CONTINUOUS_BATCHING_SINCE = (5, 24)  # version of transformers


class ContinuousBatchingReference:
    """Continuous batching: a thread decodes what is submitted, and completions come one by one.

    Its cache is sized by the task, not by the memory that is free; all else is left to its defaults. The
    thread starts with the first prompts and sleeps while there are none. What a forward holds depends on when
    the thread looks, so equal seeds need not give equal tokens. It may change its model's attention until it
    is closed. RuntimeError or ValueError where it cannot serve this model or device.
    """

    version = None

    def __init__(self, model: PreTrainedModel, task: ReferenceTask) -> None:
        if tuple(map(int, transformers.__version__.split(".")[:2])) < CONTINUOUS_BATCHING_SINCE:
            raise RuntimeError(
                f"continuous batching of transformers {transformers.__version__} is not measured: it was "
                f"seen to fail or to hang before {'.'.join(map(str, CONTINUOUS_BATCHING_SINCE))}"
            )
        self._task = task
        self._device = model.device
        pages = math.ceil((task.longest_prompt + task.max_tokens) / PAGE_TOKENS) + 1
        self._manager: Any = model.init_continuous_batching(  # type: ignore[operator]
            generation_config=_generation_config(
                model,
                max_tokens=task.max_tokens,
                temperature=task.temperature,
                eos_token_id=list(task.eos_token_ids) or NO_END,
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=task.batch * pages,
                max_batch_tokens=min(task.batch * task.longest_prompt, MOST_TOKENS_AT_ONCE),
            ),
        )
        self._num_waves = 0

    def complete(
        self, prompts: Sequence[Sequence[int]], *, seed: int, max_tokens: Sequence[int] | None = None
    ) -> Iterator[Completion]:
        """Submit all prompts at once."""
        self._num_waves += 1
        most = self._task.most_tokens(prompts, max_tokens)
        index_of = {f"{self._num_waves}-{index}": index for index in range(len(prompts))}
        with _seeded(self._device, seed), torch.inference_mode():
            if not self._manager.is_running():
                self._manager.start()
            for request_id, prompt, each in zip(index_of, prompts, most, strict=True):
                self._manager.add_request(list(prompt), request_id=request_id, max_new_tokens=each)
            while index_of:
                result = self._manager.get_result(timeout=1)
                if result is None:
                    if not self._manager.is_running():
                        raise RuntimeError("continuous batching's thread ended before the requests did")
                elif result.error is not None:
                    raise RuntimeError(f"continuous batching failed: {result.error}")
                elif result.is_finished():
                    tokens = [int(token_id) for token_id in result.generated_tokens]
                    yield Completion(index=index_of.pop(result.request_id), token_ids=tokens)

    def cpu_s(self) -> float:
        """Of this process, that thread included."""
        return time.process_time()

    def close(self) -> None:
        """End the thread and free its cache."""
        if self._manager.is_running():
            self._manager.stop(block=True, timeout=PATIENCE_S)


REFERENCES: dict[str, Callable[[PreTrainedModel, ReferenceTask], Reference]] = {
    "generate": GenerateReference,
    "continuous_batching": ContinuousBatchingReference,
    "assisted": lambda model, task: GenerateReference(model, task, lookup_tokens=LOOKUP_TOKENS),
}


@torch.inference_mode()
def generate_stock(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    eos_token_ids: Sequence[int],
    seed: int,
    lookup_tokens: int = 0,
) -> list[list[int]]:
    """One completion per prompt, all prompts in one left-padded batch; an end token is kept.

    No end tokens: every completion has `max_tokens` tokens. `lookup_tokens` above 0 drafts as many by prompt
    lookup, for a single prompt only. The global random state is left as it was.
    """
    longest = max(map(len, prompts))
    pad_id = model.config.pad_token_id or 0
    ids_BR = torch.tensor([[pad_id] * (longest - len(prompt)) + [*prompt] for prompt in prompts])
    seen_BR = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    # Some releases of prompt lookup fail at None; an id behind the vocabulary is never drawn.
    no_end = [model.config.get_text_config().vocab_size] if lookup_tokens else None
    # `generate` fills options left at None from the model's own; only here can "no end token" be said.
    model.generation_config = _generation_config(
        model,
        max_tokens=max_tokens,
        temperature=temperature,
        eos_token_id=list(eos_token_ids) or no_end,
        prompt_lookup_num_tokens=lookup_tokens or None,
    )
    with _seeded(model.device, seed):
        inputs = {"input_ids": ids_BR.to(model.device), "attention_mask": seen_BR.to(model.device)}
        output_BR = model.generate(**inputs)  # type: ignore[operator]
    completions: list[list[int]] = output_BR[:, longest:].tolist()
    return [_through_end(completion, frozenset(eos_token_ids)) for completion in completions]


def _generation_config(
    model: PreTrainedModel,
    *,
    max_tokens: int,
    temperature: float,
    eos_token_id: list[int] | int | None,
    prompt_lookup_num_tokens: int | None = None,
) -> GenerationConfig:
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_k=0 if temperature > 0 else None,
        top_p=1.0,
        max_new_tokens=max_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=model.config.pad_token_id or 0,
        prompt_lookup_num_tokens=prompt_lookup_num_tokens,
    )


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The global random state, seeded; what it was before comes back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _through_end(token_ids: list[int], ends: frozenset[int]) -> list[int]:
    for index, token_id in enumerate(token_ids):
        if token_id in ends:
            return token_ids[: index + 1]
    return token_ids
