"""Decodes, in a process and an environment of its own, what a bench sends it. `bench.peer` is the other end.

    python -P peer_worker.py vllm

One JSON object a line. The bench's first line says what comes at most: `model` (a checkpoint folder),
`dtype`, `threads`, `speculation`, `num_drafts` and the fields of a `ReferenceTask`; the answer is `ready`,
with the `version` of what decodes. Each further line is `forget`, answered by `forgot`, or a wave: `prompts`,
the `max_tokens` of each, `seed`, `batch`, `temperature` and `eos_token_ids`; the answer is one line for each
completion as it ends, `index`, `token_ids` and `logprobs` (null from an engine that gives none), then `done`,
with `cpu_s`, the processor time of the wave: that of this process and of all it has started, from the wave's
first line to its last, so that what threads of an engine take while it waits is not counted. What fails is
answered by `error`, and ends the process; so does the end of its input.

The file is run by its path and, for vLLM, imports nothing of blockroll: that environment has none.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

MEMORY_GIB = "1"  # of vLLM's key-value cache: more than any workload of a bench needs of a small model
LOOKUP_TOKENS_MOST = 4  # of the text's end that vLLM's n-gram speculation looks up
PROC = Path("/proc")


class Engine(Protocol):
    """What decodes here."""

    version: str

    def complete(self, wave: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Decode all prompts together, `batch` at a time; each completion comes when it ends."""
        ...

    def forget(self) -> None:
        """Keep nothing of the waves so far that later ones could use."""
        ...


class Generate:
    """transformers' `generate`, as the bench measures it in its own process."""

    def __init__(self, task: dict[str, Any]) -> None:
        import torch

        from blockroll.policies.loading import load_model

        torch.set_num_threads(task["threads"])
        self.version = f"torch {torch.__version__}"
        self._longest_prompt = task["longest_prompt"]
        self._model = load_model(Path(task["model"]), device="cpu", dtype=task["dtype"])

    def complete(self, wave: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Decode left-padded batches, one after the other."""
        from blockroll.bench.reference import GenerateReference, ReferenceTask

        task = ReferenceTask(
            batch=wave["batch"],
            longest_prompt=self._longest_prompt,
            max_tokens=max(wave["max_tokens"]),
            temperature=wave["temperature"],
            eos_token_ids=tuple(wave["eos_token_ids"]),
        )
        reference = GenerateReference(self._model, task)
        for completion in reference.complete(
            wave["prompts"], seed=wave["seed"], max_tokens=wave["max_tokens"]
        ):
            yield {"index": completion.index, "token_ids": completion.token_ids, "logprobs": None}

    def forget(self) -> None:
        """Nothing is kept."""


class Vllm:
    """vLLM in this one process, by its step loop, so that a completion comes when it ends.

    The log-probability of every token is computed and handed over. Draws are seeded by wave and not by
    request: a generator for each request would slow it down. Its prefix cache serves the prompts of a wave;
    the next wave does not meet its keys and values, as after an update of the weights. What suffix decoding
    remembers of texts goes on until `forget`.
    """

    def __init__(self, task: dict[str, Any]) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", MEMORY_GIB)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this process steps, and sees what ends
        speculative = _speculative(task["speculation"], task["num_drafts"])
        import torch
        import vllm
        from vllm.sampling_params import RequestOutputKind

        self._torch, self._params = torch, vllm.SamplingParams
        self._output_kind = RequestOutputKind.FINAL_ONLY
        self._has_suffixes = task["speculation"] == "suffix"
        self.version = f"vllm {vllm.__version__}, torch {torch.__version__}"
        self._llm = vllm.LLM(
            model=task["model"],
            dtype=task["dtype"],
            skip_tokenizer_init=True,
            max_num_seqs=task["batch"],
            max_model_len=task["longest_prompt"] + task["max_tokens"],
            speculative_config=speculative,
            disable_log_stats=True,
            seed=0,
        )
        self._num_requests = 0

    def complete(self, wave: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Submit prompts as places get free and step until none is left."""
        engine = self._llm.llm_engine
        engine.reset_prefix_cache()
        self._torch.manual_seed(wave["seed"])
        waiting = list(range(len(wave["prompts"])))[::-1]
        running: dict[str, int] = {}
        while waiting or running:
            while waiting and len(running) < wave["batch"]:
                index = waiting.pop()
                self._num_requests += 1
                running[str(self._num_requests)] = index
                engine.add_request(
                    str(self._num_requests),
                    {"prompt_token_ids": wave["prompts"][index]},
                    self._sampling(wave, index),
                )
            for output in engine.step():
                (text,) = output.outputs
                token_ids = list(text.token_ids)
                yield {
                    "index": running.pop(output.request_id),
                    "token_ids": token_ids,
                    "logprobs": [
                        row[token_id].logprob for row, token_id in zip(text.logprobs, token_ids, strict=True)
                    ],
                }

    def forget(self) -> None:
        """The texts that suffix decoding remembers; keys and values no wave takes over anyway."""
        if self._has_suffixes:
            self._llm.collective_rpc(_forget_suffixes)

    def _sampling(self, wave: dict[str, Any], index: int) -> Any:
        return self._params(
            temperature=wave["temperature"],
            top_p=1.0,
            top_k=0,
            max_tokens=wave["max_tokens"][index],
            ignore_eos=not wave["eos_token_ids"],
            stop_token_ids=wave["eos_token_ids"],
            logprobs=0,
            detokenize=False,
            output_kind=self._output_kind,
        )


ENGINES: dict[str, Callable[[dict[str, Any]], Engine]] = {"generate": Generate, "vllm": Vllm}


def serve(engine_name: str, tasks: Iterator[str], answer: Any) -> None:
    """Set up for the first line of `tasks` and do each further one; `answer` takes objects."""
    engine = ENGINES[engine_name](json.loads(next(tasks)))
    answer({"ready": True, "version": engine.version})
    for line in tasks:
        start = processor_time()
        wave = json.loads(line)
        if "forget" in wave:
            engine.forget()
            answer({"forgot": True})
            continue
        for completion in engine.complete(wave):
            answer(completion)
        answer({"done": True, "cpu_s": processor_time() - start})


def processor_time() -> float:
    """Seconds of all threads of this process and of all processes it has started, ended ones included."""
    reaped = os.times()
    return (
        time.process_time() + reaped.children_user + reaped.children_system + _processor_time_of_descendants()
    )


def main() -> None:
    """The answers take over standard output; whatever else prints there goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=answers, flush=True)

    try:
        serve(sys.argv[1], iter(sys.stdin), answer)
    except Exception as error:  # noqa: BLE001 (the border of a process: the bench names it and goes on)
        answer({"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)


def _speculative(method: str | None, num_drafts: int) -> dict[str, Any] | None:
    """vLLM's settings for a method of speculation; suffix decoding chooses its own number of drafts."""
    if method is None:
        return None
    if method == "suffix":
        if importlib.util.find_spec("arctic_inference") is None:
            raise ModuleNotFoundError(
                "vLLM's suffix decoding needs the package arctic-inference, which this environment lacks: it "
                "is built from source, with a C++ compiler"
            )
        return {"method": "suffix"}
    return {
        "method": method,
        "num_speculative_tokens": num_drafts,
        "prompt_lookup_max": LOOKUP_TOKENS_MOST,
    }


def _forget_suffixes(worker: Any) -> None:
    drafter = worker.model_runner.drafter
    drafter.suffix_cache = type(drafter.suffix_cache)(
        max_tree_depth=drafter.suffix_cache.max_tree_depth,
        max_cached_requests=drafter.suffix_cache.max_cached_requests,
    )


def _processor_time_of_descendants() -> float:
    """By /proc, where there is one: living processes, each with the children it has waited for."""
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for folder in PROC.glob("[0-9]*"):
        try:
            # Behind the name, which may hold anything: state, parent, ..., and from the 12th on four times.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        process_id = int(folder.name)
        children.setdefault(int(fields[1]), []).append(process_id)
        ticks[process_id] = sum(map(int, fields[11:15]))
    total, waiting = 0, [*children.get(os.getpid(), ())]
    while waiting:
        process_id = waiting.pop()
        total += ticks[process_id]
        waiting += children.get(process_id, ())
    return total / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
