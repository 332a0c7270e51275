"""TRL's trainer and ours on the same prompts: what each generates, learns and takes."""

import itertools
import multiprocessing
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import connection
from typing import Any

import trl
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from blockroll.policies.loading import TINY_POLICY_DIR
from blockroll.rl_loops import arithmetic
from blockroll.rl_loops.trl import GRPOTrainer

GENERATE_S = "bench/generate_s"
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])

Row = dict[str, Any]
Run = Callable[[TrainerCallback], list[Row]]


def timed(cls: type) -> type:
    """The trainer with the seconds of every generation round, weight sync included, in its log."""

    class Timed(cls):  # type: ignore[misc, valid-type]
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            done = super()._generate_single_turn(*args, **kwargs)
            self._metrics["train" if self.model.training else "eval"][GENERATE_S].append(
                time.perf_counter() - start
            )
            return done

    return Timed


STOCK, OURS = timed(trl.GRPOTrainer), timed(GRPOTrainer)


def is_right(completions: list[str], answer: list[int], **_: object) -> list[float]:
    """1 if the text behind the last hash is the answer."""
    return [arithmetic.reward(text, right) for text, right in zip(completions, answer, strict=True)]


def problems(seed: int, count: int) -> Dataset:
    """Arithmetic of the tiny policy's kind."""
    drawn = itertools.islice(arithmetic.problems(seed, held_out=False), count)
    return Dataset.from_list([{"prompt": each.prompt, "answer": each.answer} for each in drawn])


class Turns:
    """Lets one of several processes work at a time, each in its turn."""

    def __init__(self, count: int) -> None:
        self._may_work = [PROCESSES.Semaphore(int(index == 0)) for index in range(count)]
        self._has_left = PROCESSES.Array("b", count)

    def wait(self, index: int) -> None:
        """Block until it is this one's turn."""
        self._may_work[index].acquire()

    def pass_on(self, index: int) -> None:
        """The next one that is there may work; it is this one itself if there is no other."""
        others = [*range(index + 1, len(self._may_work)), *range(index + 1)]
        following = next((other for other in others if not self._has_left[other]), None)
        if following is not None:
            self._may_work[following].release()

    def leave(self, index: int) -> None:
        """Whose turn it is takes no more."""
        self._has_left[index] = True
        self.pass_on(index)


class StepsInTurn(TrainerCallback):
    """After each of its steps a trainer waits until all others have taken one."""

    def __init__(self, turns: Turns, index: int) -> None:
        self._turns, self._index = turns, index

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step is complete."""
        self._turns.pass_on(self._index)
        self._turns.wait(self._index)


def train_in_turn(runs: Mapping[str, Run]) -> dict[str, list[Row]]:
    """The rows of each run, by name: a step of each in turn, so what else slows the machine slows all alike.

    Each run has a process of its own, is given the callback that makes it wait, and returns its rows.
    """
    turns = Turns(len(runs))
    processes, waiting = [], {}
    for index, (name, run) in enumerate(runs.items()):
        results, done = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=_take_turns, args=(turns, index, run, done), daemon=True)
        process.start()
        done.close()  # what the process holds is now the only one: its end is the end of the results
        processes.append(process)
        waiting[results] = name
    rows: dict[str, list[Row]] = {}
    try:
        while waiting:
            for results in connection.wait(list(waiting)):
                rows[waiting[results]] = _received(results, waiting[results])
                del waiting[results]
    finally:
        for process in processes:
            process.terminate()
    return {name: rows[name] for name in runs}


def _received(results: Any, name: str) -> list[Row]:
    try:
        received: list[Row] | str = results.recv()
    except EOFError:
        raise RuntimeError(f"{name}: its process died") from None
    if isinstance(received, str):
        raise RuntimeError(f"{name}: {received}")
    return received


def _take_turns(turns: Turns, index: int, run: Run, done: Any) -> None:
    turns.wait(index)
    try:
        done.send(run(StepsInTurn(turns, index)))
    except Exception:  # noqa: BLE001 raised again where the results are gathered
        done.send(traceback.format_exc())
    finally:
        turns.leave(index)


def train(
    cls: type,
    *,
    seed: int,
    steps: int,
    batch: int,
    group: int = 8,
    model: str = str(TINY_POLICY_DIR),
    reward: Any = is_right,
    dataset: Dataset | None = None,
    arguments: dict[str, Any] | None = None,
    **options: Any,
) -> list[Row]:
    """Logged steps of one run."""
    with tempfile.TemporaryDirectory() as folder:
        args = trl.GRPOConfig(
            output_dir=folder,
            seed=seed,
            max_steps=steps,
            per_device_train_batch_size=batch,
            **{
                "bf16": False,
                "num_generations": group,
                "max_completion_length": 64,
                "learning_rate": 2e-4,
                "lr_scheduler_type": "constant_with_warmup",
                "warmup_steps": 2,
                **(arguments or {}),
            },
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            gradient_checkpointing=False,
        )
        dataset = dataset if dataset is not None else problems(seed, steps * batch)
        trainer = cls(model, reward_funcs=reward, args=args, train_dataset=dataset, **options)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return [row for row in trainer.state.log_history if "reward" in row]


def medians(rows: list[Row], *names: str) -> dict[str, float]:
    """Over the steps of a run, the first left out: it warms up."""
    return {name: statistics.median(row[name] for row in rows[1:]) for name in names}
