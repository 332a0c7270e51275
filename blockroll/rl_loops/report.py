"""`report.html`: one run on one page that needs nothing but itself, not even a network.

Reads what the run left in its folder: config.yaml, metrics.jsonl, rollouts.jsonl and, if a benchmark or a
sweep was run beside it, speed.json or sweep.jsonl. A trainer of another library says in words what
config.yaml would.
"""

import html
import importlib.metadata
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from blockroll.bench.frontier import SweepRow, from_record
from blockroll.errors import InvalidInput
from blockroll.rl_loops import figures
from blockroll.rl_loops.cards import CSS, card, table
from blockroll.rl_loops.display import number
from blockroll.rl_loops.tracking import read_lines
from blockroll.rl_loops.watch.figures import shaded
from blockroll.rl_loops.watch.page import frontier_card, story_section, watch_cards
from blockroll.rl_loops.watch.rows import Rows, evaluations, series, stretches
from blockroll.rl_loops.watch.story import speed_ratios, story

NUM_SAMPLES = 6


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into the run folder and return its path."""
    folder = Path(run_dir)
    rows = read_lines(folder / "metrics.jsonl")
    if not rows or not (folder / "config.yaml").is_file():
        raise InvalidInput(f"{folder} holds no finished step (config.yaml and metrics.jsonl): train first")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    samples = read_lines(folder / "rollouts.jsonl")
    speed = json.loads((folder / "speed.json").read_text()) if (folder / "speed.json").is_file() else []
    algorithm, task = config["train"]["algorithm"].upper(), config["task"]
    about = f"{algorithm} on {task}, {rows[-1]['step']} steps, rollouts by plan {rows[-1]['plan']}"
    name = folder.resolve().name
    page = _page(
        name,
        about,
        rows,
        setting=_setting(config, rows),
        sweep=[from_record(record) for record in read_lines(folder / "sweep.jsonl")],
        samples=samples,
        speed=speed,
        asked_steps=config["train"]["steps"],
    )
    return _write(folder, page)


def write_trainer_report(folder: Path, *, name: str, about: str, setting: Mapping[str, str]) -> Path:
    """The same page from metrics.jsonl alone; `setting` is its last table."""
    logged = read_lines(folder / "metrics.jsonl")
    rewards = {row["step"]: row["eval_reward"] for row in logged if "eval_reward" in row}
    rows = [
        {**row, **({"eval/reward": rewards[row["step"]]} if row["step"] in rewards else {})}
        for row in logged
        if "reward" in row
    ]
    if not rows:
        raise InvalidInput(f"{folder} holds no finished step in metrics.jsonl: train first")
    return _write(folder, _page(name, about, rows, setting={**setting, **_machine()}))


def _write(folder: Path, page: str) -> Path:
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _page(
    name: str,
    about: str,
    rows: Rows,
    *,
    setting: Mapping[str, str],
    samples: Rows = (),
    speed: Rows = (),
    sweep: Sequence[SweepRow] = (),
    asked_steps: int | None = None,
) -> str:
    reward, *others = _cards(rows, speed)
    swept = [frontier_card(sweep)] if sweep else []
    figured = "".join([reward, *watch_cards(rows), *swept, *others])
    title = f"Run {html.escape(name)}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{title} · blockroll</title><style>{CSS}</style></head>'
        f"<body><main>"
        f"<header><h1>{title}</h1><p>{html.escape(about)}</p>"
        f"</header>{story_section(story(rows, speed=speed, asked_steps=asked_steps))}"
        f'<section class="tiles">{_tiles(rows, speed)}</section>'
        f'<section class="grid">{figured}</section>'
        f'<section class="card wide"><h2>Samples</h2><p class="note">The first rollouts of the earliest and '
        f'the latest steps, as they were drawn.</p><div class="samples">{_samples(samples)}</div></section>'
        f'<section class="card wide"><h2>Setting</h2>{table(setting)}</section>'
        f"</main></body></html>\n"
    )


def _tiles(rows: Rows, speed: Rows) -> str:
    held_out = evaluations(rows)
    rewards = held_out or series(rows, "reward")
    label = "mean reward, held-out prompts" if held_out else "mean reward, training prompts"
    tiles = []
    if rewards:
        tiles.append((f"{number(rewards[0][1])} → {number(rewards[-1][1])}", label))
    for key, digits, text in (
        ("rollout/acceptance_rate", 2, "of the drafts accepted"),
        ("rollout/tokens_per_forward", 2, "tokens per forward"),
    ):
        values = [value for _, value in series(rows, key)]
        if values:
            tiles.append((number(statistics.fmean(values), digits), text))
    if ratios := speed_ratios(speed):
        batch, _, ratio = ratios[0]
        tiles.append((f"{ratio:.2f}×", f"as fast as plain at batch {batch}"))  # noqa: RUF001
    sync = [value for _, value in series(rows, "perf/weight_sync_s")]
    if sync:
        tiles.append((f"{1000 * statistics.median(sync):.0f} ms", "median weight sync"))
    return "".join(
        f'<div class="tile"><b>{html.escape(b)}</b><span>{html.escape(s)}</span></div>' for b, s in tiles
    )


def _cards(rows: Rows, speed: Rows) -> list[str]:
    acceptance = series(rows, "rollout/acceptance_rate")
    tokens = series(rows, "rollout/tokens_per_forward")
    sync = [(step, 1000 * seconds) for step, seconds in series(rows, "perf/weight_sync_s")]
    reward_at = dict(series(rows, "reward"))
    points = [(rate, reward_at[step], step) for step, rate in acceptance if step in reward_at]
    no_drafts = "Plain decoding drafts nothing, so there is no acceptance to show."
    failed = sum(1 for row in rows if row.get("sync/engines_stale"))
    fallbacks = stretches(rows)
    return [
        card(
            "Reward",
            "Mean over the rollouts of each step, and over held-out prompts with fixed seeds.",
            figures.draw(shaded(figures.reward(series(rows, "reward"), evaluations(rows)), fallbacks)),
        ),
        card(
            "Speed of drafted against plain rollouts",
            "Measured on this machine in this run: bars are medians, dots are repeats."
            if speed
            else "Not measured in this run; the benchmark writes speed.json into the run folder.",
            figures.draw(figures.speed(speed)) if speed else "",
        ),
        card(
            "Acceptance",
            "Accepted drafts per draft submitted to verify." if acceptance else no_drafts,
            figures.draw(shaded(figures.over_steps(acceptance, "acceptance rate", low=0, high=1), fallbacks))
            if acceptance
            else "",
        ),
        card(
            "Tokens per forward",
            "Committed tokens per request-forward; both forwards of two-forward count. Plain gives 1.",
            figures.draw(figures.over_steps(tokens, "tokens per forward", low=0)) if tokens else "",
        ),
        card(
            "Reward against acceptance",
            "Each dot is a step. A drift to the left: drafts decay as the policy moves."
            if points
            else no_drafts,
            figures.draw(figures.reward_against_acceptance(points)) if points else "",
        ),
        card(
            "Weight sync",
            f"From packing to the last replica's checksum. Steps that left a replica stale: {failed}.",
            figures.draw(figures.over_steps(sync, "milliseconds", colour=figures.AMBER, low=0))
            if sync
            else "",
        ),
    ]


def _samples(samples: Rows) -> str:
    half = NUM_SAMPLES // 2
    chosen = samples if len(samples) <= NUM_SAMPLES else [*samples[:half], *samples[-half:]]
    parts = []
    for sample in chosen:
        value = sample["reward"]
        kind = "good" if value is not None and value > 0 else "bad"
        prompt = sample["prompt"] if isinstance(sample["prompt"], str) else json.dumps(sample["prompt"])
        parts.append(
            f'<div><span class="note">step {sample["step"]} · reward '
            f'<b class="{kind}">{number(value, 2)}</b> · '
            f"{sample['num_accepted']} of {sample['num_tokens']} tokens drafted</span>"
            f"<pre><i>{html.escape(prompt)}</i>{html.escape(sample['completion'])}</pre></div>"
        )
    return "".join(parts) or '<p class="note">None were kept.</p>'


def _setting(config: Mapping[str, Any], rows: Rows) -> dict[str, str]:
    policy, rollout, train, last = config["policy"], config["rollout"], config["train"], rows[-1]
    kind = rollout["backend"] or ("local" if rollout.get("placement") == "colocated" else "ray")
    replicas = {"ray": "Ray actors", "local": "in the learner's process"}.get(kind, f"of backend {kind}")
    return {
        "policy": f"{policy['path']}, {policy['dtype']}, device {policy['device']}",
        "task": f"{config['task']}, seed {config['seed']}",
        "replicas": f"{rollout['num_replicas']} {replicas}, {rollout['threads_per_replica']} threads each",
        "plan": f"{last['plan']}, T {rollout['temperature']:g}, up to {rollout['max_tokens']} tokens",
        "update": f"{train['prompts_per_step']} prompts times {train['group_size']} rollouts, learning rate "
        f"{train['learning_rate']:g}, clip {train['clip_epsilon']:g}, {train['learner_threads']} threads",
        "kernels": last.get("kernels", "not recorded"),
        "policy version": f"{last['sync/version']:.0f} served by every replica at the end",
        "failed": f"{last['rollout/failed_total']:.0f} rollouts, {last['reward/failed_total']:.0f} rewards, "
        f"{last['sync/checksum_fail_total']:.0f} refused weight updates",
        **_machine(),
    }


def _machine() -> dict[str, str]:
    packages = ("blockroll", "torch", "transformers", "ray", "trl")
    versions = ", ".join(f"{name} {version}" for name in packages if (version := _version(name)))
    return {
        "versions": f"Python {platform.python_version()}, {versions}",
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
