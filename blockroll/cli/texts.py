"""One sample at a time, as it is decoded: generate."""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from blockroll.cli.options import (
    AdapterOption,
    DeviceOption,
    JsonOption,
    PolicyOption,
    SeedOption,
    ThreadsOption,
    load_policy,
    with_sampling,
)
from blockroll.errors import BlockrollError, InvalidInput
from blockroll.types import Constraint, Plan, Request, Rollout, Sampling

if TYPE_CHECKING:
    from blockroll.policies.hf import HFPolicy
    from blockroll.rollout.drafters.engine import Engine

DRAFTED_STYLE = "bold green underline"
_LONGEST_WAIT = 64  # tokens: an untrained policy may never complete a character


@with_sampling(max_tokens=64)
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    sampling: Mapping[str, Any],
    policy: PolicyOption = "tiny",
    adapter: AdapterOption = None,
    seed: SeedOption = 0,
    plan: Annotated[
        str | None,
        typer.Option(
            help="'auto', 'plain', 'two_forward(K)', 'fused(K,[levels])' or 'history(K)'; left out: "
            "two_forward if the policy was taught to draft, else plain."
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message, for the chat template to frame.")
    ] = False,
    regex: Annotated[str | None, typer.Option(help="What the whole completion must match.")] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="A file with the JSON schema that the completion must satisfy.")
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Samples, one after the other.")] = 1,
    task: Annotated[
        Literal["auto", "arithmetic", "none"],
        typer.Option(
            help="'arithmetic' ends the prompt with the line break its problems end with; 'none' takes the "
            "prompt as given; 'auto' is arithmetic for the tiny policy."
        ),
    ] = "auto",
    mark: Annotated[
        bool, typer.Option("--mark", help="Mark drafted tokens as [text] where there is no color.")
    ] = False,
    as_json: JsonOption = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 1,
) -> None:
    """Stream samples token by token. Drafted and accepted tokens are marked."""
    options = Sampling(**sampling, constraint=_constraint(regex, json_schema))
    if not chat and (task == "arithmetic" or (task == "auto" and policy == "tiny")):
        prompt = prompt.rstrip("\n") + "\n"
    hf_policy = load_policy(policy, device, threads, adapter)
    chosen = plan if plan is not None else ("two_forward" if hf_policy.trained_drafts else "plain")
    given = [{"role": "user", "content": prompt}] if chat else prompt
    engine, requests = engine_for(hf_policy, chosen, given, options, seed=seed, num_samples=num_samples)
    console = Console(highlight=False, soft_wrap=True)
    is_styled = console.is_terminal and not console.no_color
    if as_json:
        for request in requests:
            rollout = stream(engine, hf_policy, request, Console(quiet=True), is_styled=False, mark=False)
            typer.echo(json.dumps(_record(rollout, hf_policy, engine.plan)))
        return
    if is_styled or mark:
        sign = Text("green", style=DRAFTED_STYLE) if is_styled else Text("[brackets]")
        console.print(
            Text.assemble("Drafted and accepted tokens are in ", sign, "; the target drew the rest.")
        )
    for index, request in enumerate(requests):
        if num_samples > 1:
            console.print(f"--- sample {index + 1}", style="dim")
        rollout = stream(engine, hf_policy, request, console, is_styled=is_styled, mark=mark)
        Console(stderr=not console.is_terminal, highlight=False, soft_wrap=True).print(
            Text(f"{engine.plan.name}: {counts(rollout)}"), style="dim"
        )


def _record(rollout: Rollout, policy: "HFPolicy", plan: Plan) -> dict[str, Any]:
    """A sample as JSON; a log-probability that is not finite is null."""
    stats = rollout.stats
    return {
        "text": policy.decode(list(rollout.token_ids)),
        "finish_reason": rollout.finish_reason,
        "law": rollout.law.name,
        "plan": plan.name,
        "seed": rollout.request.seed,
        "prompt_ids": list(rollout.request.prompt_ids),
        "token_ids": list(rollout.token_ids),
        "policy_logprobs": _finite(rollout.policy_logprobs),
        "behavior_logprobs": _finite(rollout.behavior_logprobs),
        "num_forwards": stats.num_forwards,
        "num_drafted": stats.num_drafted,
        "num_accepted": stats.num_accepted,
    }


def _finite(numbers: Sequence[float]) -> list[float | None]:
    return [number if math.isfinite(number) else None for number in numbers]


def _constraint(regex: str | None, json_schema: Path | None) -> Constraint | None:
    from blockroll.samplers.constraints import JsonSchema, Regex

    if regex is not None and json_schema is not None:
        raise InvalidInput("give --regex or --json-schema, not both")
    if regex is not None:
        return Regex(regex)
    if json_schema is None:
        return None
    try:
        return JsonSchema(json_schema.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"--json-schema {json_schema} cannot be read as text: {error}") from None


def engine_for(
    policy: "HFPolicy",
    plan: str,
    prompt: str | list[dict[str, str]],
    sampling: Sampling,
    *,
    seed: int,
    num_samples: int,
) -> tuple["Engine", list[Request]]:
    """An engine that decodes one request at a time, and the requests, as a pool would make them."""
    from blockroll.rollout.drafters.engine import Engine
    from blockroll.rollout.planning.reading import read_plan
    from blockroll.rollout.pool.pool import RolloutPool
    from blockroll.rollout.pool.replica import LocalReplica

    engine = Engine(policy, plan=read_plan(plan, policy), max_batch_size=1)
    pool = RolloutPool([LocalReplica(engine, policy.model)], tokenizer=policy.tokenizer)
    return engine, pool.requests([prompt], sampling, seed=seed, num_samples=num_samples)


class GrowingText:
    """The text of a growing list of tokens, piece by piece, at a cost that does not grow with it."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []  # tokens given out last, and those still to be
        self._num_given = 0  # of the window

    def add(self, token_ids: Sequence[int]) -> str:
        """What these tokens add. A character whose last bytes are still to come waits for them."""
        self._window.extend(token_ids)
        before, text = self._decode(self._window[: self._num_given]), self._decode(self._window)
        if text.endswith("\ufffd") and len(self._window) - self._num_given < _LONGEST_WAIT:
            return ""
        fresh = text[len(before) :]
        if fresh:
            self._window = self._window[self._num_given :]
            self._num_given = len(self._window)
        return fresh


def stream(
    engine: "Engine", policy: "HFPolicy", request: Request, console: Console, *, is_styled: bool, mark: bool
) -> Rollout:
    """Print one sample while it is decoded."""
    growing = GrowingText(policy.decode)

    def show(new_ids: Sequence[int], *, is_drafted: bool) -> None:
        fresh = growing.add(new_ids)
        if fresh:
            console.print(_styled(fresh, is_drafted, is_styled=is_styled, mark=mark), end="")

    engine.submit([request])
    while True:
        result = engine.step()
        for commit in result.commits:
            pairs = zip(commit.token_ids, commit.is_draft, strict=True)
            for is_drafted, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
                show([token_id for token_id, _ in run], is_drafted=is_drafted)
        if result.finished:
            break
    console.print()
    (rollout,) = result.finished
    if rollout.error is not None:
        raise BlockrollError(f"generation failed: {rollout.error}")
    return rollout


def _styled(text: str, is_drafted: bool, *, is_styled: bool, mark: bool) -> Text:
    if is_drafted and is_styled:
        return Text(text, style=DRAFTED_STYLE)
    if is_drafted and mark:
        # A line break outside the brackets keeps the lines of the text what they are.
        lines = [f"[{line}]" if line else "" for line in text.split("\n")]
        return Text("\n".join(lines))
    return Text(text)


def counts(rollout: Rollout) -> str:
    """What a sample took, for people."""
    stats, num_tokens = rollout.stats, len(rollout.token_ids)
    rate = num_tokens / stats.num_forwards
    line = f"{num_tokens} tokens, {stats.num_forwards} forwards, {rate:.2f} tokens per forward"
    if stats.num_drafted:
        drafts = f"{stats.num_accepted} of {stats.num_drafted} drafts"
        line += f", acceptance {stats.acceptance_rate:.2f} ({drafts})"
    return line
