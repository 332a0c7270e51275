"""Reading and checking what a run recorded of every token: audit show, check, stats."""

import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from blockroll.errors import CheckpointError, InvalidInput

if TYPE_CHECKING:
    from blockroll.policies.hf import HFPolicy
    from blockroll.rollout.audit.rows import AuditedRequest

Read = Callable[[Sequence[int]], str]  # text of token ids
PROMPT_START = 48  # characters of a prompt in a list

audit = typer.Typer(no_args_is_help=True, help="What a run recorded of every token: show, check, stats.")

RunArgument = Annotated[Path, typer.Argument(help="Folder of a run, or an audit folder itself.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@audit.command()
def show(
    run: RunArgument,
    request: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Request id; left out: the list of what there is.")
    ] = None,
    serving: Annotated[
        int | None, typer.Option(min=1, help="Which of them, where an id was served more than once.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Lines of the list at most.")] = 40,
) -> None:
    """List the requests of an audit; with an ID one rollout, token by token: drafted, accepted, why."""
    from blockroll.rollout.audit.files import audit_files, read_audit
    from blockroll.rollout.audit.rows import joined

    folder = _folder(run)
    requests = joined([read_audit(path) for path in audit_files(folder)]).requests
    read = _reader(run)
    if request is None:
        _print_list(requests, read, limit)
        return
    found = [each for each in requests if each.name == request]
    if not found:
        near = difflib.get_close_matches(request, {each.name for each in requests}, n=1)
        advice = f"did you mean {near[0]!r}? " if near else ""
        raise InvalidInput(f"no request {request!r} in {folder}: {advice}`audit show {run}` lists them")
    if serving is not None and serving > len(found):
        raise InvalidInput(f"request {request!r} was served {len(found)} times, got --serving {serving}")
    if serving is None and len(found) > 1:
        console = Console(highlight=False, soft_wrap=True)
        console.print(
            f"Request {request!r} was served {len(found)} times: choose by --serving N.", markup=False
        )
        _print_list(found, read, limit)
        return
    _print_rollout(found[(serving or 1) - 1], read)


def _print_list(requests: "Sequence[AuditedRequest]", read: Read, limit: int) -> None:
    """A line per serving, in the order they were written."""
    table = Table(box=None, pad_edge=False)
    for column in ("request", "serving", "tokens", "version", "finish", "prompt"):
        table.add_column(column, no_wrap=True, justify="right" if column in ("serving", "tokens") else "left")
    counted: dict[str, int] = {}
    for request in requests[:limit]:
        counted[request.name] = counted.get(request.name, 0) + 1
        prompt = read(request.prompt_ids) if request.info else "(not there)"
        table.add_row(
            Text(request.name),
            str(counted[request.name]),
            str(len(request.numbers)),
            _ranges(sorted(set(request.numbers["version"].tolist()))),
            request.finish_reason,
            Text(prompt if len(prompt) <= PROMPT_START else prompt[: PROMPT_START - 3] + "..."),
        )
    _print_wide(table)
    if len(requests) > limit:
        Console(highlight=False).print(f"{len(requests) - limit:,} more; --limit N shows more of them")


def _print_rollout(request: "AuditedRequest", read: Read) -> None:
    from blockroll.rollout.audit.writer import KINDS

    title = f"request {request.name}, {len(request.numbers)} tokens, {request.finish_reason}"
    if request.info:
        title += f"\nprompt {read(request.prompt_ids)}"
        if request.info["prefix_ids"]:
            title += f"\ngone on from {read(request.info['prefix_ids'])}"
    table = Table(title=Text(title), title_justify="left")
    for column in ("", "token", "kind", "drafted"):
        table.add_column(column, no_wrap=True)
    for column in ("draft", "target", "coin", "drawn by", "behavior", "version"):
        table.add_column(column, justify="right")
    for row in request.numbers:
        table.add_row(
            str(row["position"]),
            Text(read([int(row["token"])])),
            KINDS[row["kind"]] if 0 <= row["kind"] < len(KINDS) else f"unknown ({row['kind']})",
            Text(read([int(row["draft"])])) if row["draft"] >= 0 else "",
            *(_figure(row[name]) for name in ("draft_prob", "target_prob", "coin", "uniform")),
            f"{row['behavior_logprob']:.3f}",
            str(row["version"]),
        )
    _print_wide(table)


def _print_wide(table: Table) -> None:
    """A pipe has no width of its own; in a narrow terminal only figures may be cut."""
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


@audit.command()
def check(
    run: RunArgument,
    level: Annotated[
        int, typer.Option(min=1, max=2, help="1: the files alone; 2: also with the policy of each version.")
    ] = 2,
    policy: Annotated[
        Path | None, typer.Option(help="Checkpoint of version 0, where the run's config does not name it.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Repeat every decision. Exit code 1 if a row is bad, and its name."""
    from blockroll.rollout.audit.check import check_audit
    from blockroll.rollout.audit.files import audit_files

    console = Console(highlight=False, soft_wrap=True)
    files, policy_of = audit_files(_folder(run)), _policies(run, policy) if level == 2 else None
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("check", total=None)
        report = check_audit(
            files,
            policy_of=policy_of,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if as_json:
        fields = {
            "passed": report.passed,
            "problem": None if report.problem is None else report.problem._asdict(),
            "files": report.num_files,
            "rows": report.num_rows,
            "requests": report.num_requests,
            "recomputed_by_version": report.recomputed,
            "versions_without_policy": report.without_policy,
            "rows_of_unknown_law": report.num_unknown_laws,
            "near_ties": report.num_near_ties,
            "largest_difference": report.largest_difference,
            "tolerance": report.tolerance,
            "unfinished_files": report.unfinished,
        }
        typer.echo(json.dumps(fields))
    else:
        console.print(
            f"{report.num_rows:,} rows of {report.num_requests:,} requests in {report.num_files} files"
        )
        if report.problem is None:
            console.print("Level 1: every decision follows from the file.", style="green")
            if report.recomputed:
                versions = _ranges(sorted(report.recomputed))
                console.print(
                    f"Level 2: the laws are those of the policy, versions {versions}; probabilities differ "
                    f"by at most {report.largest_difference:.1e}, where {report.tolerance:.1e} is allowed.",
                    style="green",
                )
        if report.without_policy:
            missing = _ranges(report.without_policy)
            console.print(
                f"No checkpoint is left of versions {missing}: checked at level 1 only.", style="yellow"
            )
        if report.num_unknown_laws:
            console.print(
                f"{report.num_unknown_laws:,} rows have a constraint or logits processors, whose code is not "
                "in the file, or truncation below float32, whose cuts move with rounding: of these only the "
                "policy's log-probability was recomputed.",
                style="yellow",
            )
        if report.num_near_ties:
            console.print(
                f"{report.num_near_ties:,} rows were cut (top-k, top-p, min-p) between tokens so close that "
                "rounding decides, and have another law here: of these the law was not compared.",
                style="yellow",
            )
        if report.unfinished:
            console.print(
                f"Left behind by a process that died: {', '.join(report.unfinished)}", style="yellow"
            )
        if report.problem is not None:
            console.print(f"BAD ROW: {report.problem}", style="bold red")
    if not report.passed:
        raise typer.Exit(1)


@audit.command()
def stats(run: RunArgument, as_json: JsonOption = False) -> None:
    """Acceptance by position, whether residual draws are uniform, perplexity by place in a block."""
    from blockroll.rollout.audit.files import audit_files
    from blockroll.rollout.audit.stats import audit_stats

    found = audit_stats(audit_files(_folder(run)))
    if as_json:
        typer.echo(json.dumps(found))
        return
    console = Console(highlight=False)
    console.print(
        f"{found['rows']:,} tokens of {found['requests']:,} requests ({found['ids']:,} ids): "
        + ", ".join(f"{count:,} {kind}" for kind, count in found["kinds"].items())
    )
    table = Table("position in the step", "drafts", "accepted", "perplexity", title_justify="left")
    for offset, row in enumerate(found["by_offset"]):
        table.add_row(
            str(offset + 1), f"{row['drafts']:,}", _figure(row["acceptance"]), f"{row['perplexity']:.3f}"
        )
    console.print(table)
    uniforms = found["residual_uniforms"]
    if uniforms is not None:
        console.print(("" if uniforms["passed"] else "[bold red]BAD[/] ") + uniforms["found"])


def _folder(run: Path) -> Path:
    """The audit folder of a run."""
    if not run.is_dir():
        raise InvalidInput(f"{run} is no folder: give the folder of a run, as runs/demo")
    return run / "audit" if (run / "audit").is_dir() else run


def _policies(run: Path, given: Path | None) -> "Callable[[int], HFPolicy | None]":
    """The policy of a version: the run's start for 0, the checkpoint of its step for others."""
    from blockroll.policies.hf import HFPolicy
    from blockroll.rl_loops.loop import load_run_config

    config = load_run_config(run).policy if (run / "config.yaml").is_file() else None

    def policy_of(version: int) -> "HFPolicy | None":
        adapter = None if config is None else config.adapter
        if version == 0:
            source = given or (None if config is None else config.path)
        else:
            folder = run / "checkpoints" / f"step_{version:06d}"
            source = folder if folder.is_dir() else None
        if source is None:
            return None
        dtype = "float32" if config is None else config.dtype
        return HFPolicy.from_pretrained(source, adapter=adapter, dtype=dtype)

    return policy_of


def _reader(run: Path) -> Read:
    """Text of tokens, quoted, if the policy of the run is at hand; else their ids."""
    from blockroll.policies.loading import load_tokenizer
    from blockroll.rl_loops.loop import load_run_config

    try:
        tokenizer: Any = load_tokenizer(load_run_config(run).policy.path)
    except (CheckpointError, InvalidInput):
        return lambda tokens: " ".join(map(str, tokens))
    return lambda tokens: repr(tokenizer.decode(list(tokens)))


def _figure(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.4g}"


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as people write them: 0, 3 to 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low} to {high}" for low, high in runs)
