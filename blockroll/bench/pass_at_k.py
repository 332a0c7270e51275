"""pass@k: the chance that at least one of k samples of a prompt is correct.

Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", section 2.1, equation 1.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blockroll.errors import InvalidInput
from blockroll.rollout.engine.requests import derive_seed
from blockroll.types import Request, Rollout, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Which rollouts are judged, and by what."""

    is_correct: Callable[[int, tuple[int, ...]], bool]  # index of the prompt, completion
    num_prompts: int = 32  # the first so many, or all if there are fewer
    num_samples: int = 8  # of each prompt
    k: int = 4

    def __post_init__(self) -> None:
        if self.num_prompts < 1 or not 1 <= self.k <= self.num_samples:
            raise InvalidInput(
                f"pass@k needs at least 1 prompt and a k from 1 to the samples of a prompt, got "
                f"{self.num_prompts} prompts, k = {self.k} and {self.num_samples} samples"
            )

    def requests(self, prompts: Sequence[tuple[int, ...]], sampling: Sampling, *, seed: int) -> list[Request]:
        """The samples of every prompt, with independent seeds."""
        return [
            Request(
                request_id=f"{index}/{sample}",
                prompt_ids=prompt,
                seed=derive_seed("pass@k", seed, index, sample),
                sampling=sampling,
            )
            for index, prompt in enumerate(prompts[: self.num_prompts])
            for sample in range(self.num_samples)
        ]

    def passed(self, rollouts: Sequence[Rollout]) -> "Passed":
        """What the rollouts of `requests` are worth, in any order."""
        correct: dict[int, int] = {}
        for rollout in rollouts:
            index = int(rollout.request.request_id.partition("/")[0])
            correct[index] = correct.get(index, 0) + self.is_correct(index, rollout.token_ids)

        def mean(k: int) -> float:
            return statistics.fmean(pass_at_k(self.num_samples, count, k) for count in correct.values())

        return Passed(
            at_1=mean(1), at_k=mean(self.k), k=self.k, samples=self.num_samples, prompts=len(correct)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """Means over prompts."""

    at_1: float
    at_k: float
    k: int
    samples: int  # of each prompt
    prompts: int


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the share of the k-subsets of n samples that hold one of the c correct.

    Law: an unbiased estimate of 1 - (1 - p)^k if samples are independent and correct with probability p; the
    plug-in 1 - (1 - c/n)^k is biased downwards.
    """
    if not (0 <= num_correct <= num_samples and 1 <= k <= num_samples):
        raise InvalidInput(
            f"pass@k needs 0 <= correct <= samples and 1 <= k <= samples, got {num_correct} correct, "
            f"{num_samples} samples and k = {k}"
        )
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)
