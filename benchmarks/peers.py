"""A real pretrained model beside transformers and vLLM, in cells that are measured once each.

    python -m benchmarks.evidence speed peers --minutes 25 --gsm8k FILE
    python -m benchmarks.peers      start vLLM once, which compiles and keeps what it has compiled

The parts, with about what each takes on a quiet machine with 2 cores, one thread:

- three vLLM processes start: 1 minute, once a run; the first time they compile, 4 minutes;
- `even`, every text 48 tokens, batch 1, 8 and 32, beside `generate`: 5 minutes;
- `worked` and `gsm8k`, 8 siblings of each prompt, 2 epochs, at temperature 0.7 and 1: at batch 8 3 minutes
  each, at batch 1 4 minutes each.

GSM8K's questions are left out, by name, without a file of them. `speed peers_two_threads` measures `even` on
two threads, `speed peers_float32` all of it in float32.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.cells import GIVEN, measured
from benchmarks.rows import Row
from benchmarks.workload import SMOLLM2, threads, working_dtype
from blockroll.bench.bench import PEERS_PYTHON, BenchOptions, run_bench, to_record
from blockroll.bench.peer import PEERS
from blockroll.bench.peer_pool import PeerPool
from blockroll.bench.prompts import gsm8k_prompts, worked_prompts
from blockroll.bench.reference import ReferenceTask
from blockroll.bench.subjects import make_peer_pool
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.planning.reading import read_plan
from blockroll.types import PLAIN

NAME = "speed_peers"  # of the result file
MAX_TOKENS = 48
SIBLINGS = 8
EPOCHS = 2
NUM_PROMPTS = 32
PromptMaker = Callable[[HFPolicy], list[tuple[int, ...]]]
SPECULATING = ("vllm", "vllm_ngram", "vllm_suffix")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What one call of the bench measures."""

    prompts: str  # of `PROMPTS`
    batch: int
    temperature: float
    repeats: int
    shape: str = "grouped"
    against: tuple[str, ...] = SPECULATING

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.shape}-{self.prompts}-batch{self.batch}-temperature{self.temperature:g}"

    def options(self, max_tokens: int) -> BenchOptions:
        """As the bench takes them: even texts are all of one length, grouped ones end where they end."""
        is_even = self.shape == "even"
        return BenchOptions(
            batches=(self.batch,),
            temperatures=(self.temperature,),
            repeats=self.repeats,
            rollouts=1,
            max_tokens=(max_tokens,),
            ignore_eos=is_even,
            shape="even" if is_even else "grouped",
            siblings=SIBLINGS,
            epochs=EPOCHS,
        )


def even_cells() -> list[Cell]:
    """Plain decoding: nothing comes back that could be looked up."""
    against = ("generate", "vllm", "vllm_ngram")
    return [
        Cell(prompts="chat", batch=batch, temperature=1.0, repeats=repeats, shape="even", against=against)
        for batch, repeats in ((1, 5), (8, 5), (32, 3))
    ]


def grouped_cells() -> list[Cell]:
    """As in RL: what is worth most comes first."""
    return [
        Cell(prompts=prompts, batch=batch, temperature=temperature, repeats=repeats)
        for batch, repeats in ((8, 3), (1, 1))
        for prompts in ("worked", "gsm8k")
        for temperature in (0.7, 1.0)
    ]


def measure(
    cells: Sequence[Cell],
    folder: Path = SMOLLM2 / "policy",
    *,
    prompts: dict[str, PromptMaker],
    name: str = NAME,
    num_threads: int = 1,
    max_tokens: int = MAX_TOKENS,
    dtype: str = "bfloat16",
) -> list[Row]:
    """The rows of all cells; `prompts` has for each of their names what makes them."""
    with threads(num_threads):
        policy = HFPolicy.from_pretrained(folder, dtype=dtype)
        texts = {kind: prompts[kind](policy) for kind in {cell.prompts for cell in cells}}
        pool = make_peer_pool(policy, str(folder))
        for cell in cells:
            pool.make_room(_task(cell, texts[cell.prompts], max_tokens))
        try:
            return measured(
                name,
                {
                    cell.name: partial(_measured, cell, policy, texts[cell.prompts], folder, pool, max_tokens)
                    for cell in cells
                },
            )
        finally:
            pool.close()


def start(
    cells: Sequence[Cell],
    folder: Path = SMOLLM2 / "policy",
    *,
    prompts: dict[str, PromptMaker],
    num_threads: int = 1,
    max_tokens: int = MAX_TOKENS,
    dtype: str = "bfloat16",
) -> None:
    """Start each peer once as `measure` does, which then finds what vLLM has compiled."""
    with threads(num_threads):
        policy = HFPolicy.from_pretrained(folder, dtype=dtype)
        pool = make_peer_pool(policy, str(folder))
        try:
            tasks = [_task(cell, prompts[cell.prompts](policy), max_tokens) for cell in cells]
            for task in tasks:
                pool.make_room(task)
            for name in dict.fromkeys(name for cell in cells for name in cell.against if name in PEERS):
                begun = time.monotonic()
                pool.reference(name, tasks[0]).close()
                print(f"{NAME}: {name} took {time.monotonic() - begun:.0f} s to start", flush=True)
        finally:
            pool.close()


def _task(cell: Cell, texts: Sequence[tuple[int, ...]], max_tokens: int) -> ReferenceTask:
    return ReferenceTask(
        batch=cell.batch,
        longest_prompt=max(map(len, texts)),
        max_tokens=max_tokens,
        temperature=cell.temperature,
        eos_token_ids=(),
    )


def _measured(
    cell: Cell,
    policy: HFPolicy,
    texts: Sequence[tuple[int, ...]],
    folder: Path,
    pool: PeerPool,
    max_tokens: int,
) -> list[Row]:
    found = run_bench(
        policy,
        texts,
        [PLAIN, read_plan("auto", policy)],
        cell.options(max_tokens),
        policy_path=str(folder),
        against=cell.against,
        peers=pool,
    )
    return [{**to_record(row), "prompts": cell.prompts} for row in found]


def chat_prompts(policy: HFPolicy) -> list[tuple[int, ...]]:
    """The held-out questions of examples/smollm2.py."""
    from examples.smollm2 import HELD_OUT_TOPICS, prompt_ids, questions

    return prompt_ids(policy, list(questions(HELD_OUT_TOPICS)))


def short_questions(policy: HFPolicy, path: Path) -> list[tuple[int, ...]]:
    """The first questions of GSM8K that are not long: a prompt's length is no subject here."""
    return [text for text in gsm8k_prompts(policy, path) if len(text) <= 128][:NUM_PROMPTS]


def every_cell(gsm8k: Path) -> tuple[list[Cell], dict[str, PromptMaker]]:
    """Cells, and what makes their prompts; without a file of GSM8K those of its questions are left out."""
    prompts = {
        "chat": chat_prompts,
        "worked": partial(worked_prompts, count=NUM_PROMPTS),
        "gsm8k": partial(short_questions, path=gsm8k),
    }
    cells = [*even_cells(), *grouped_cells()]
    if not gsm8k.is_file():
        print(f"{NAME}: GSM8K is left out: no {gsm8k}; put one of its files there, or name it by --gsm8k")
        cells = [cell for cell in cells if cell.prompts != "gsm8k"]
    return cells, prompts


def missing() -> str | None:
    """What the experiment needs and lacks; None: nothing."""
    if not (SMOLLM2 / "policy" / "config.json").is_file():
        return f"no {SMOLLM2 / 'policy'}; run examples/smollm2.py first"
    if not PEERS_PYTHON.is_file():
        return f"no {PEERS_PYTHON}; run `make peers` first"
    return None


def peers() -> list[Row]:
    """Every cell that there is time for, on one thread."""
    cells, prompts = every_cell(GIVEN.gsm8k)
    return measure(cells, prompts=prompts)


def peers_float32() -> list[Row]:
    """The same in float32, for processors that do not multiply in bfloat16."""
    cells, prompts = every_cell(GIVEN.gsm8k)
    return measure(cells, prompts=prompts, name=f"{NAME}_float32", dtype="float32")


def peers_two_threads() -> list[Row]:
    """Plain decoding on two."""
    cells, prompts = every_cell(GIVEN.gsm8k)
    even = [cell for cell in cells if cell.shape == "even"]
    return measure(even, prompts=prompts, name=f"{NAME}_two_threads", num_threads=2)


if __name__ == "__main__":
    if (reason := missing()) is not None:
        raise SystemExit(f"{NAME}: {reason}")
    every, makers = every_cell(GIVEN.gsm8k)
    start(every, prompts=makers, dtype=working_dtype())
