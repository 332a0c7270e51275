"""A real pretrained model beside transformers and vLLM, in cells that are measured once each.

    python -m benchmarks.peers --minutes 25     begin no cell later than that
    python -m benchmarks.peers --only-start     let vLLM compile, which it keeps, and measure nothing
    python -m benchmarks.evidence speed peers   all of them

Cells whose rows have been kept, of the same commit, are not measured again: a run that was interrupted goes
on. The parts, with about what each takes on a quiet machine with 2 cores, one thread:

- three vLLM processes start: 1 minute, once a run; the first time they compile, 4 minutes;
- `even`, every text 48 tokens, batch 1, 8 and 32, beside `generate`: 5 minutes;
- `worked` and `gsm8k`, 8 siblings of each prompt, 2 epochs, at temperature 0.7 and 1: at batch 8 3 minutes
  each, at batch 1 4 minutes each.

GSM8K's questions are read from `--gsm8k FILE`; without a file they are left out, by name.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import rows
from benchmarks.rows import Row
from benchmarks.workload import RUNS, SMOLLM2, threads
from blockroll.bench.bench import PEERS_PYTHON, BenchOptions, run_bench, to_record
from blockroll.bench.peer import PEERS
from blockroll.bench.peer_pool import PeerPool
from blockroll.bench.prompts import gsm8k_prompts, worked_prompts
from blockroll.bench.reference import ReferenceTask
from blockroll.bench.subjects import make_peer_pool
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.planning.planner import read_plan
from blockroll.types import PLAIN

NAME = "speed_peers"  # of the result file
KEPT = RUNS / "peers"  # rows of each cell, from when it was measured until the commit changes
GSM8K = Path("runs") / "gsm8k.jsonl"
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
    kept: Path = KEPT,
    num_threads: int = 1,
    max_tokens: int = MAX_TOKENS,
    dtype: str = "bfloat16",
    deadline: float | None = None,
) -> list[Row]:
    """The rows of all cells, those kept of this commit among them; a cell is kept as soon as it is measured.

    `prompts` has for each name what makes them. No cell begins after `deadline`, by `time.monotonic`.
    """
    commit = rows.provenance()["commit"]
    with threads(num_threads):
        policy = HFPolicy.from_pretrained(folder, dtype=dtype)
        texts = {name: prompts[name](policy) for name in {cell.prompts for cell in cells}}
        pool = make_peer_pool(policy, str(folder))
        found: list[Row] = []
        try:
            for cell in cells:
                pool.make_room(_task(cell, texts[cell.prompts], max_tokens))
            for cell in cells:
                path = kept / f"{cell.name}-threads{num_threads}.json"
                measured = _kept(path, commit)
                if measured is None and (deadline is None or time.monotonic() < deadline):
                    begun = time.monotonic()
                    measured = _measured(cell, policy, texts[cell.prompts], folder, pool, max_tokens)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps({"commit": commit, "rows": measured}))
                    print(f"{NAME}: {cell.name} took {time.monotonic() - begun:.0f} s", flush=True)
                elif measured is None:
                    print(f"{NAME}: {cell.name} is left out: there is no time for it", flush=True)
                found += measured or []
        finally:
            pool.close()
    return found


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
    measured = run_bench(
        policy,
        texts,
        [PLAIN, read_plan("auto", policy)],
        cell.options(max_tokens),
        policy_path=str(folder),
        against=cell.against,
        peers=pool,
    )
    return [{**to_record(row), "prompts": cell.prompts} for row in measured]


def _kept(path: Path, commit: str | None) -> list[Row] | None:
    """The rows of a cell, if they are of this commit."""
    if not path.is_file():
        return None
    kept = json.loads(path.read_text())
    return kept["rows"] if kept["commit"] == commit else None


def chat_prompts(policy: HFPolicy) -> list[tuple[int, ...]]:
    """The held-out questions of examples/smollm2.py."""
    from examples.smollm2 import HELD_OUT_TOPICS, prompt_ids, questions

    return prompt_ids(policy, list(questions(HELD_OUT_TOPICS)))


def short_questions(policy: HFPolicy, path: Path) -> list[tuple[int, ...]]:
    """The first questions of GSM8K that are not long: a prompt's length is no subject here."""
    return [text for text in gsm8k_prompts(policy, path) if len(text) <= 128][:NUM_PROMPTS]


def every_cell(gsm8k: Path = GSM8K) -> tuple[list[Cell], dict[str, PromptMaker]]:
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


def peers(*, gsm8k: Path = GSM8K, num_threads: int = 1, deadline: float | None = None) -> list[Row]:
    """Every cell that there is time for."""
    cells, prompts = every_cell(gsm8k)
    return measure(cells, prompts=prompts, num_threads=num_threads, deadline=deadline)


def main() -> None:
    """Measure what is not kept, and write the rows of all that is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, help="begin no cell later")
    parser.add_argument("--gsm8k", type=Path, default=GSM8K, help="a file of GSM8K")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch and of vLLM; rows of 2 have a file of their own"
    )
    parser.add_argument("--only-start", action="store_true", help="let vLLM compile, and measure nothing")
    given = parser.parse_args()
    if (reason := missing()) is not None:
        parser.error(reason)
    if given.only_start:
        cells, prompts = every_cell(given.gsm8k)
        start(cells, prompts=prompts, num_threads=given.threads)
        return
    deadline = None if given.minutes is None else time.monotonic() + 60 * given.minutes
    found = peers(gsm8k=given.gsm8k, num_threads=given.threads, deadline=deadline)
    rows.write(NAME if given.threads == 1 else f"{NAME}_{given.threads}_threads", found)


if __name__ == "__main__":
    main()
