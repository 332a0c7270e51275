"""Decodes, in a process and an environment of its own, what a bench sends it. `bench.peer` is the other end.

    python -P peer_worker.py vllm

One JSON object a line. The bench's first line is the task: `model` (a checkpoint folder), `dtype`, `threads`,
`num_drafts` and the fields of a `ReferenceTask`; the answer is `ready`, with the `version` of what decodes.
Each further line is a wave, `prompts` and `seed`; the answer is one line for each completion as it ends,
`index`, `token_ids` and `logprobs` (null from an engine that gives none), then `done`, with `cpu_s`, the
processor time of the wave: what threads of an engine take while it waits for one is not counted. What fails
is answered by `error`, and ends the process; so does the end of its input.

The file is run by its path and, for vLLM, imports nothing of blockroll: that environment has none.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

MEMORY_GIB = "1"  # of vLLM's key-value cache: more than any workload of a bench needs of a small model
LOOKUP_TOKENS_MOST = 4  # of the text's end that vLLM looks up


class Engine(Protocol):
    """What decodes here."""

    version: str

    def complete(self, prompts: list[list[int]], seed: int) -> Iterator[dict[str, Any]]:
        """Decode all prompts together; each completion comes when it ends."""
        ...


class Generate:
    """transformers' `generate`, as the bench measures it in its own process."""

    def __init__(self, task: dict[str, Any]) -> None:
        import torch

        from blockroll.bench.reference import GenerateReference, ReferenceTask
        from blockroll.policies.loading import load_model

        torch.set_num_threads(task["threads"])
        self.version = f"torch {torch.__version__}"
        self._reference = GenerateReference(
            load_model(Path(task["model"]), device="cpu", dtype=task["dtype"]),
            ReferenceTask(
                batch=task["batch"],
                longest_prompt=task["longest_prompt"],
                max_tokens=task["max_tokens"],
                temperature=task["temperature"],
                eos_token_ids=tuple(task["eos_token_ids"]),
            ),
        )

    def complete(self, prompts: list[list[int]], seed: int) -> Iterator[dict[str, Any]]:
        """Decode left-padded batches, one after the other."""
        for completion in self._reference.complete(prompts, seed=seed):
            yield {"index": completion.index, "token_ids": completion.token_ids, "logprobs": None}


class Vllm:
    """vLLM in this one process, by its step loop, so that a completion comes when it ends.

    The log-probability of every token is computed and handed over. With `num_drafts` as many tokens a step
    are drafted by its n-gram lookup. Draws are seeded by wave and not by request: a generator for each
    request would slow it down. A wave meets no keys and values of the one before.
    """

    def __init__(self, task: dict[str, Any]) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", MEMORY_GIB)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the processor time is then this process's
        import torch
        import vllm
        from vllm.sampling_params import RequestOutputKind

        self._torch = torch
        self.version = f"vllm {vllm.__version__}, torch {torch.__version__}"
        self._sampling = vllm.SamplingParams(
            temperature=task["temperature"],
            top_p=1.0,
            top_k=0,
            max_tokens=task["max_tokens"],
            ignore_eos=not task["eos_token_ids"],
            stop_token_ids=task["eos_token_ids"],
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._engine = vllm.LLM(
            model=task["model"],
            dtype=task["dtype"],
            skip_tokenizer_init=True,
            max_num_seqs=task["batch"],
            max_model_len=task["longest_prompt"] + task["max_tokens"],
            speculative_config=_ngram(task["num_drafts"]),
            disable_log_stats=True,
            seed=0,
        ).llm_engine
        self._num_requests = 0

    def complete(self, prompts: list[list[int]], seed: int) -> Iterator[dict[str, Any]]:
        """Submit all prompts at once and step until none is left."""
        self._engine.reset_prefix_cache()
        self._torch.manual_seed(seed)
        index_of = {str(self._num_requests + index): index for index in range(len(prompts))}
        self._num_requests += len(prompts)
        for request_id, index in index_of.items():
            self._engine.add_request(request_id, {"prompt_token_ids": prompts[index]}, self._sampling)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                (text,) = output.outputs
                token_ids = list(text.token_ids)
                yield {
                    "index": index_of[output.request_id],
                    "token_ids": token_ids,
                    "logprobs": [
                        row[token_id].logprob for row, token_id in zip(text.logprobs, token_ids, strict=True)
                    ],
                }


ENGINES: dict[str, Callable[[dict[str, Any]], Engine]] = {"generate": Generate, "vllm": Vllm}


def serve(engine_name: str, tasks: Iterator[str], answer: Any) -> None:
    """Set up for the first line of `tasks` and decode each further one; `answer` takes objects."""
    engine = ENGINES[engine_name](json.loads(next(tasks)))
    answer({"ready": True, "version": engine.version})
    for line in tasks:
        start = time.process_time()
        wave = json.loads(line)
        for completion in engine.complete(wave["prompts"], wave["seed"]):
            answer(completion)
        answer({"done": True, "cpu_s": time.process_time() - start})


def main() -> None:
    """Serve on what was standard output; what anything else prints there goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=answers, flush=True)

    try:
        serve(sys.argv[1], iter(sys.stdin), answer)
    except Exception as error:  # noqa: BLE001 (the border of a process: the bench names it and goes on)
        answer({"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)


def _ngram(num_drafts: int) -> dict[str, Any] | None:
    if not num_drafts:
        return None
    return {
        "method": "ngram",
        "num_speculative_tokens": num_drafts,
        "prompt_lookup_max": LOOKUP_TOKENS_MOST,
    }


if __name__ == "__main__":
    main()
