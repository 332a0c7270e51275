"""Plans measured against each other: bench."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from blockroll.cli.lists import numbers, split_plans, whole_numbers
from blockroll.cli.options import (
    AdapterOption,
    DeviceOption,
    PolicyOption,
    SeedOption,
    ThreadsOption,
    check_output,
    load_policy,
)
from blockroll.cli.prompts import FILE_HELP, prompts_from
from blockroll.cli.sweep import check_given, run, sweep_options
from blockroll.cli.tables import print_whole, write_records
from blockroll.errors import InvalidInput
from blockroll.types import PLAIN

if TYPE_CHECKING:
    from blockroll.bench.bench import BenchRow, Judge
    from blockroll.policies.hf import HFPolicy

BENCH_PROMPTS = 256
GSM8K = "gsm8k:"  # and a file


def bench(
    context: typer.Context,
    policy: PolicyOption = "tiny",
    adapter: AdapterOption = None,
    plans: Annotated[
        str,
        typer.Option(
            help="Plans, separated by commas: 'auto', 'plain', 'two_forward(K)', 'fused(K,[0,...])', "
            "'history(K)'."
        ),
    ] = "plain,two_forward",
    mix_weight: Annotated[
        str,
        typer.Option(help="Laws, separated by commas: 1 is the target, below 1 its weight in the mixture."),
    ] = "1",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8,64",
    temperature: Annotated[
        str, typer.Option(help="Sampling temperatures, separated by commas; 0 is greedy.")
    ] = "1",
    prompts: Annotated[
        str,
        typer.Option(
            help="'text': arithmetic problems; 'worked': sums behind two that are worked out, for pretrained "
            "models; 'gsm8k:FILE': the questions of a GSM8K file, as a user's message where there is a chat "
            f"template; 'random': token ids drawn at random; else {FILE_HELP}."
        ),
    ] = "text",
    prompt_tokens: Annotated[
        str | None,
        typer.Option(help="Exact prompt lengths, separated by commas; left out: as long as each prompt is."),
    ] = None,
    max_tokens: Annotated[str, typer.Option(help="Completion lengths at most, separated by commas.")] = "64",
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Every completion has --max-tokens tokens.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Measured rounds of each workload.")] = 5,
    rollouts: Annotated[int, typer.Option(help="Rollouts of one round at least.")] = 8,
    queue: Annotated[int, typer.Option(help="Rollouts submitted together for each place in the batch.")] = 1,
    workload: Annotated[
        Literal["even", "grouped", "skewed"],
        typer.Option(
            help="'even': another prompt for each rollout; 'grouped': --siblings rollouts of each prompt, "
            "--epochs times over; 'skewed': heavy-tailed lengths, few of them near --max-tokens."
        ),
    ] = "even",
    siblings: Annotated[int, typer.Option(help="Rollouts of each prompt of a grouped workload.")] = 8,
    epochs: Annotated[int, typer.Option(help="Times that a grouped workload goes through its prompts.")] = 2,
    seed: SeedOption = 0,
    against: Annotated[
        str | None,
        typer.Option(
            help="Also measure transformers' own 'generate', 'continuous_batching', 'assisted' (by prompt "
            "lookup), or 'vllm', 'vllm_ngram' (its n-gram speculation) and 'vllm_suffix' (its suffix "
            "decoding), which `make peers` installs, or 'generate_process' (in a process of its own, as vLLM "
            "is), separated by commas."
        ),
    ] = None,
    peers_python: Annotated[
        Path | None,
        typer.Option(help="The Python of vLLM's environment; left out: .venv-peers of the source tree."),
    ] = None,
    task: Annotated[
        str,
        typer.Option(
            help="'arithmetic' judges the answers: pass@1 and pass@k of each plan and law. A sweep also "
            "takes a Python path 'module:attribute' of a Task, as train does."
        ),
    ] = "none",
    samples: Annotated[int, typer.Option(help="Judged samples of each prompt.")] = 8,
    pass_k: Annotated[int, typer.Option(help="The k of pass@k.")] = 4,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="Reward against acceptance and speed of every plan, mix weight and draft temperature, "
            "by --samples rollouts of each prompt; marks the fastest that loses at most --max-loss. Needs "
            "--task. Prompts are the task's held-out ones, or --prompts FILE with the columns that its "
            "reward needs; left out, --mix-weight is 1,0.75,0.5,0.25 and --batch 8.",
        ),
    ] = False,
    draft_temperature: Annotated[
        str | None,
        typer.Option(
            help="Sweep: temperatures that drafts are drawn at, separated by commas; left out: as "
            "--temperature."
        ),
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(help="Sweep: how many prompts; left out: 256, or all if there are fewer.")
    ] = None,
    max_loss: Annotated[
        float, typer.Option(help="Sweep: the loss of mean reward that is none, as a share of its range.")
    ] = 0.01,
    reward_low: Annotated[
        float, typer.Option(help="Sweep: the least that a reward can be, and what failed.")
    ] = 0.0,
    reward_high: Annotated[float, typer.Option(help="Sweep: the most that a reward can be.")] = 1.0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the rows: a JSON array, or lines if it ends in .jsonl."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Draw speed-up over plain and acceptance by draft position into this .png; of a sweep, "
            "reward against speed and against acceptance."
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of weights and forwards, of all that is measured.")
    ] = "float32",
    threads: ThreadsOption = 1,
) -> None:
    """Measure plans, laws, transformers and vLLM against each other. Lists span a grid, in one run."""
    from blockroll.bench.bench import PEERS_PYTHON, BenchOptions, run_bench
    from blockroll.rollout.planning.reading import read_plan

    check_given(context, is_sweep=sweep)
    _check_outputs(json_file, picture)
    if sweep:
        swept = sweep_options(context)
        hf_policy = load_policy(policy, device, threads, adapter, dtype=dtype)
        run(
            hf_policy,
            [read_plan(text, hf_policy) for text in split_plans(plans)],
            swept,
            policy_path=policy,
            prompts=prompts,
            task=task,
            num_prompts=num_prompts,
            json_file=json_file,
            picture=picture,
        )
        return
    options = BenchOptions(
        batches=whole_numbers("--batch", batch),
        temperatures=numbers("--temperature", temperature),
        prompt_tokens=(None,) if prompt_tokens is None else whole_numbers("--prompt-tokens", prompt_tokens),
        max_tokens=whole_numbers("--max-tokens", max_tokens),
        mix_weights=numbers("--mix-weight", mix_weight),
        prompt_source="random" if prompts == "random" else "text",
        ignore_eos=ignore_eos,
        repeats=repeats,
        rollouts=rollouts,
        queue=queue,
        shape=workload,
        siblings=siblings,
        epochs=epochs,
        seed=seed,
    )
    if task not in ("none", "arithmetic"):
        raise InvalidInput(f"--task {task} is for a sweep: give --sweep too, or 'arithmetic' or 'none'")
    if prompts != "text" and task != "none":
        raise InvalidInput(f"--task {task} judges its own problems: leave out --prompts {prompts}, or --task")
    hf_policy = load_policy(policy, device, threads, adapter, dtype=dtype)
    parsed = [read_plan(text, hf_policy) for text in split_plans(plans)]
    if picture is not None and PLAIN not in parsed:
        raise InvalidInput(f"--picture draws speed-ups over plain: add 'plain' to --plans, got {plans!r}")
    chosen = _chosen_prompts(prompts, hf_policy)
    console = Console()
    with console.status("measuring ...") as status:
        rows = run_bench(
            hf_policy,
            chosen,
            parsed,
            options,
            policy_path=policy,
            against=against.replace(" ", "").split(",") if against else (),
            peers_python=peers_python or PEERS_PYTHON,
            judge=_arithmetic_judge(hf_policy, samples, pass_k) if task == "arithmetic" else None,
            on_row=lambda row: status.update(f"measured {row.plan} at batch {row.batch} ..."),
        )
    print_table(console, rows, title=f"{policy} on {rows[0].setting.device}, {rows[0].setting.dtype}")
    if json_file is not None:
        write_rows(json_file, rows)
        console.print(f"{len(rows)} rows written to {json_file}", highlight=False, soft_wrap=True)
    if picture is not None:
        _draw_bench(picture, rows)
        console.print(f"Picture: {picture}", highlight=False, soft_wrap=True)


def _check_outputs(json_file: Path | None, picture: Path | None) -> None:
    """Refuse before measuring what could not be written after it."""
    for option, path in (("--json", json_file), ("--picture", picture)):
        if path is not None:
            check_output(option, path)
    if picture is not None and picture.suffix != ".png":
        raise InvalidInput(f"--picture {picture}: give a file that ends in .png")


def _chosen_prompts(source: str, policy: "HFPolicy") -> list[tuple[int, ...]]:
    """What `--prompts` names, as tokens; none where they are drawn at random."""
    from blockroll.bench.prompts import gsm8k_prompts, worked_prompts

    if source == "random":
        return []
    if source == "text":
        return arithmetic_prompts(policy)
    if source == "worked":
        return worked_prompts(policy, BENCH_PROMPTS)
    if source.startswith(GSM8K):
        return gsm8k_prompts(policy, Path(source.removeprefix(GSM8K)))
    return prompts_from(Path(source), policy)


def arithmetic_prompts(policy: "HFPolicy") -> list[tuple[int, ...]]:
    from blockroll.policies.prompts import PromptEncoder
    from blockroll.rl_loops.tasks import load_task

    if policy.tokenizer is None:
        raise InvalidInput("the checkpoint has no tokenizer, and the bench's prompts are text")
    rows = load_task("arithmetic").eval_rows(BENCH_PROMPTS)
    encode = PromptEncoder(policy.tokenizer)
    return [encode(row["prompt"]) for row in rows]


def _arithmetic_judge(policy: "HFPolicy", samples: int, k: int) -> "Judge":
    """Judges the first of `arithmetic_prompts` by the task's reward."""
    from blockroll.bench.bench import Judge
    from blockroll.rl_loops.tasks import load_task

    task = load_task("arithmetic")
    rows = task.eval_rows(BENCH_PROMPTS)

    def is_correct(index: int, token_ids: tuple[int, ...]) -> bool:
        rewards = task.reward_fn(
            prompts=[rows[index]["prompt"]],
            completions=[policy.decode(list(token_ids))],
            completion_ids=[list(token_ids)],
            answer=[rows[index]["answer"]],
        )
        return rewards[0] == 1.0

    return Judge(is_correct=is_correct, num_samples=samples, k=k)


def print_table(console: Console, rows: Sequence["BenchRow"], *, title: str) -> None:
    from blockroll.bench.table import bench_table

    print_whole(console, bench_table(rows, title=title))


def _draw_bench(path: Path, rows: Sequence["BenchRow"]) -> None:
    from blockroll.bench.bench import to_record
    from blockroll.rl_loops.figures import save_bench

    save_bench([to_record(row) for row in rows], path)


def write_rows(path: Path, rows: Sequence["BenchRow"]) -> None:
    from blockroll.bench.bench import to_record

    write_records(path, [to_record(row) for row in rows])
