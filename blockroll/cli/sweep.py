"""Reward against acceptance and speed: bench --sweep."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from blockroll.cli.lists import numbers, whole_numbers
from blockroll.cli.prompts import rows_from
from blockroll.cli.tables import print_whole, write_records
from blockroll.errors import InvalidInput

if TYPE_CHECKING:
    from blockroll.bench.sweep import Reward, SweepOptions
    from blockroll.policies.hf import HFPolicy
    from blockroll.rl_loops.tasks import Row, Task
    from blockroll.rollout.planning.planner import Planner
    from blockroll.types import Plan, Rollout

SWEEP_PROMPTS = 256
# Parameters of bench, by what has a use for them.
ONLY_SWEEP = ("draft_temperature", "max_loss", "reward_low", "reward_high", "num_prompts")
NOT_SWEEP = (
    "prompt_tokens",
    "ignore_eos",
    "repeats",
    "rollouts",
    "workload",
    "siblings",
    "epochs",
    "against",
    "peers_python",
    "pass_k",
)
# What a sweep has in place of bench's defaults.
DEFAULTS: Mapping[str, Any] = {"mix_weight": "1,0.75,0.5,0.25", "batch": "8"}


def check_given(context: typer.Context, *, is_sweep: bool) -> None:
    """InvalidInput for an option that is given and would be of no use."""
    given = [name for name in (NOT_SWEEP if is_sweep else ONLY_SWEEP) if was_given(context, name)]
    if not given:
        return
    named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
    if is_sweep:
        raise InvalidInput(
            f"{named} has no use with --sweep, which decodes every prompt --samples times at one batch size: "
            "leave it out"
        )
    raise InvalidInput(f"{named} belongs to a sweep: give --sweep too, or leave it out")


def was_given(context: typer.Context, name: str) -> bool:
    """Whether the option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def load_rows(
    prompts: str, task: "Task", num_prompts: int | None, policy: "HFPolicy"
) -> tuple[list["Row"], list[tuple[int, ...]]]:
    """What is asked, with the columns that its reward needs: the task's held-out rows, or those of a file."""
    from blockroll.policies.prompts import PromptEncoder
    from blockroll.rl_loops.tasks import checked_row

    if num_prompts is not None and num_prompts < 1:
        raise InvalidInput(f"--num-prompts must be at least 1, got {num_prompts}")
    count = num_prompts or SWEEP_PROMPTS
    if prompts == "text":
        where = f"held-out rows of task {task.name!r}"
        rows = [(number, checked_row(row, task.name)) for number, row in enumerate(task.eval_rows(count), 1)]
        if not rows:
            raise InvalidInput(f"task {task.name!r} has no held-out rows: give --prompts FILE")
    else:
        where = f"prompts of {prompts}"
        rows = [(number, checked_row(row, prompts)) for number, row in rows_from(Path(prompts))]
    if num_prompts is not None and len(rows) < num_prompts:
        raise InvalidInput(f"--num-prompts asks for {num_prompts}, but there are {len(rows)}: {where}")
    encode = PromptEncoder(policy.tokenizer, vocab_size=policy.vocab_size)
    chosen = rows[:count]
    encoded = [encode(row["prompt"], name=f"number {number} of the {where}") for number, row in chosen]
    return [row for _, row in chosen], encoded


def reward_of(task: "Task", rows: Sequence["Row"], policy: "HFPolicy") -> "Reward":
    """The task's reward of rollouts of these rows, as a run has it."""
    from blockroll.rl_loops.advantages import score_rollouts

    def reward(places: Sequence[int], rollouts: Sequence["Rollout"]) -> list[float]:
        completions = [policy.decode(list(rollout.token_ids)) for rollout in rollouts]
        scores = score_rollouts(task.reward_fn, [rows[place] for place in places], rollouts, completions)
        found: list[float] = scores.rewards_B.tolist()
        return found

    return reward


def sweep_options(context: typer.Context) -> "SweepOptions":
    """What bench was given, as a sweep takes it. InvalidInput without a task, or for two batch sizes."""
    from blockroll.bench.sweep import SweepOptions

    given = {**context.params}
    given |= {name: value for name, value in DEFAULTS.items() if not was_given(context, name)}
    if given["task"] == "none":
        raise InvalidInput(
            "--sweep holds rewards against speed and has none: give --task arithmetic, or --task "
            "module:attribute of a Task"
        )
    for name in ("batch", "max_tokens"):
        if "," in given[name]:
            raise InvalidInput(f"--{name.replace('_', '-')}: a sweep takes one, got {given[name]!r}")
    drafts = given["draft_temperature"]
    return SweepOptions(
        mix_weights=numbers("--mix-weight", given["mix_weight"]),
        temperatures=numbers("--temperature", given["temperature"]),
        draft_temperatures=(None,) if drafts is None else numbers("--draft-temperature", drafts),
        batch=whole_numbers("--batch", given["batch"])[0],
        queue=given["queue"],
        max_tokens=whole_numbers("--max-tokens", given["max_tokens"])[0],
        samples=given["samples"],
        max_loss=given["max_loss"],
        reward_low=given["reward_low"],
        reward_high=given["reward_high"],
        seed=given["seed"],
    )


def run(
    policy: "HFPolicy",
    plans: Sequence["Plan | Planner"],
    options: "SweepOptions",
    *,
    policy_path: str,
    prompts: str,
    task: str,
    num_prompts: int | None,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Measure under a progress bar; write and draw the rows, print them and what is concluded."""
    from blockroll.bench.frontier import conclusion, to_record
    from blockroll.bench.sweep import run_sweep
    from blockroll.bench.sweep_table import sweep_table
    from blockroll.rl_loops.tasks import load_task

    loaded = load_task(task)
    rows, encoded = load_rows(prompts, loaded, num_prompts, policy)
    console = Console()
    with _Bar(console) as show:
        found = run_sweep(
            policy,
            encoded,
            plans,
            options,
            reward=reward_of(loaded, rows, policy),
            task=loaded.name,
            policy_path=policy_path,
            on_progress=show,
        )
    setting = found[0].setting
    print_whole(console, sweep_table(found, title=f"{policy_path} on {setting.device}, {setting.dtype}"))
    for line in conclusion(found):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if json_file is not None:
        write_records(json_file, [to_record(row) for row in found])
        console.print(f"{len(found)} rows written to {json_file}", highlight=False, soft_wrap=True)
    if picture is not None:
        from blockroll.rl_loops.watch.figures import save_sweep

        save_sweep(found, picture)
        console.print(f"Picture: {picture}", highlight=False, soft_wrap=True)


class _Bar:
    """Gives a function that moves a bar; where there is no terminal there is none."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("sweeping"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Callable[[int, int], None]:
        self._progress.start()
        task = self._progress.add_task("", total=None)
        return lambda done, total: self._progress.update(task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
