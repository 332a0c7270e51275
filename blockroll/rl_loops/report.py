"""`report.html`: one run on one page that needs nothing but itself, not even a network.

Reads what the run left in its folder: config.yaml, metrics.jsonl, rollouts.jsonl and, if a benchmark
was run beside it, speed.json. A trainer of another library says in words what config.yaml would.
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

from blockroll.errors import InvalidInput
from blockroll.rl_loops import figures
from blockroll.rl_loops.display import number
from blockroll.rl_loops.tracking import read_lines

Rows = Sequence[Mapping[str, Any]]
NUM_SAMPLES = 6

CSS = """
:root { --paper:#f6f7f9; --card:#fff; --ink:#1f2733; --soft:#667085; --grid:#d8dde5;
        --good:#2a9d8f; --bad:#c2564b }
@media (prefers-color-scheme: dark) {
  :root { --paper:#14181f; --card:#1c222b; --ink:#e4e8ee; --soft:#98a2b3; --grid:#39424f }
}
* { box-sizing:border-box }
body { margin:0; background:var(--paper); color:var(--ink); line-height:1.5;
       font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif }
main { max-width:1120px; margin:0 auto; padding:40px 24px 64px }
h1 { font-size:28px; margin:0; letter-spacing:-.01em } h2 { font-size:16px; margin:0 0 4px }
header p, .note { color:var(--soft); margin:4px 0 0 } .note { font-size:13px; margin:0 0 10px }
.tiles { display:grid; gap:14px; grid-template-columns:repeat(auto-fit,minmax(165px,1fr)); margin:26px 0 }
.tile, .card { background:var(--card); border:1px solid var(--grid); border-radius:12px }
.tile { padding:14px 16px } .tile b { display:block; font-size:22px; font-weight:600; letter-spacing:-.01em }
.tile span { color:var(--soft); font-size:13px }
.grid { display:grid; gap:18px; grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr)) }
.card { padding:18px 20px } .card svg { width:100%; height:auto; display:block }
.card svg text { font-family:system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif !important }
.wide { margin-top:18px } table { border-collapse:collapse; width:100%; font-size:14px }
td { padding:5px 12px 5px 0; vertical-align:top; border-top:1px solid var(--grid) }
tr:first-child td { border-top:0 }
td:first-child { color:var(--soft); white-space:nowrap; width:1% }
.samples { display:grid; gap:14px; grid-template-columns:repeat(auto-fill,minmax(300px,1fr)) }
pre { margin:6px 0 0; padding:10px 12px; border-radius:8px; background:var(--paper); overflow:auto;
      max-height:220px;
      font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace; white-space:pre-wrap }
pre i { color:var(--soft); font-style:normal } .good { color:var(--good) } .bad { color:var(--bad) }
"""


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
    return _write(folder, _page(name, about, rows, samples, speed, _setting(config, rows)))


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
    return _write(folder, _page(name, about, rows, (), (), {**setting, **_machine()}))


def _write(folder: Path, page: str) -> Path:
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def evaluations(rows: Rows) -> list[tuple[float, float]]:
    """(step, mean reward) on held-out prompts; step 0 is the policy the run started from."""
    first = rows[0].get("eval/initial_reward")
    before = [(rows[0]["step"] - 1.0, float(first))] if first is not None else []
    return before + _series(rows, "eval/reward")


def _page(name: str, about: str, rows: Rows, samples: Rows, speed: Rows, setting: Mapping[str, str]) -> str:
    cards = "".join(_cards(rows, speed))
    title = f"Run {html.escape(name)}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{title} · blockroll</title><style>{CSS}</style></head>'
        f"<body><main>"
        f"<header><h1>{title}</h1><p>{html.escape(about)}</p>"
        f'</header><section class="tiles">{_tiles(rows, speed)}</section>'
        f'<section class="grid">{cards}</section>'
        f'<section class="card wide"><h2>Samples</h2><p class="note">The first rollouts of the earliest and '
        f'the latest steps, as they were drawn.</p><div class="samples">{_samples(samples)}</div></section>'
        f'<section class="card wide"><h2>Setting</h2>{_table(setting)}</section>'
        f"</main></body></html>\n"
    )


def _tiles(rows: Rows, speed: Rows) -> str:
    held_out = evaluations(rows)
    rewards = held_out or _series(rows, "reward")
    label = "mean reward, held-out prompts" if held_out else "mean reward, training prompts"
    tiles = []
    if rewards:
        tiles.append((f"{number(rewards[0][1])} → {number(rewards[-1][1])}", label))
    for key, digits, text in (
        ("rollout/acceptance_rate", 2, "of the drafts accepted"),
        ("rollout/tokens_per_forward", 2, "tokens per forward"),
    ):
        values = [value for _, value in _series(rows, key)]
        if values:
            tiles.append((number(statistics.fmean(values), digits), text))
    cells = {(row["plan"], row["batch"]): float(row["tokens_per_s"]) for row in speed}
    ratios = [
        (batch, value / cells["plain", batch])
        for (plan, batch), value in cells.items()
        if plan != "plain" and ("plain", batch) in cells
    ]
    if ratios:
        batch, ratio = min(ratios)
        tiles.append((f"{ratio:.2f}×", f"as fast as plain at batch {batch}"))  # noqa: RUF001
    sync = [value for _, value in _series(rows, "perf/weight_sync_s")]
    if sync:
        tiles.append((f"{1000 * statistics.median(sync):.0f} ms", "median weight sync"))
    return "".join(
        f'<div class="tile"><b>{html.escape(b)}</b><span>{html.escape(s)}</span></div>' for b, s in tiles
    )


def _cards(rows: Rows, speed: Rows) -> list[str]:
    acceptance = _series(rows, "rollout/acceptance_rate")
    tokens = _series(rows, "rollout/tokens_per_forward")
    sync = [(step, 1000 * seconds) for step, seconds in _series(rows, "perf/weight_sync_s")]
    reward_at = dict(_series(rows, "reward"))
    points = [(rate, reward_at[step], step) for step, rate in acceptance if step in reward_at]
    no_drafts = "Plain decoding drafts nothing, so there is no acceptance to show."
    failed = sum(1 for row in rows if row.get("sync/engines_stale"))
    return [
        _card(
            "Reward",
            "Mean over the rollouts of each step, and over held-out prompts with fixed seeds.",
            figures.draw(figures.reward(_series(rows, "reward"), evaluations(rows))),
        ),
        _card(
            "Speed of drafted against plain rollouts",
            "Measured on this machine in this run: bars are medians, dots are repeats."
            if speed
            else "Not measured in this run; the benchmark writes speed.json into the run folder.",
            figures.draw(figures.speed(speed)) if speed else "",
        ),
        _card(
            "Acceptance",
            "Accepted drafts per draft submitted to verify." if acceptance else no_drafts,
            figures.draw(figures.over_steps(acceptance, "acceptance rate", low=0, high=1))
            if acceptance
            else "",
        ),
        _card(
            "Tokens per forward",
            "Committed tokens per request-forward; both forwards of two-forward count. Plain gives 1.",
            figures.draw(figures.over_steps(tokens, "tokens per forward", low=0)) if tokens else "",
        ),
        _card(
            "Reward against acceptance",
            "Each dot is a step. A drift to the left: drafts decay as the policy moves."
            if points
            else no_drafts,
            figures.draw(figures.reward_against_acceptance(points)) if points else "",
        ),
        _card(
            "Weight sync",
            f"From packing to the last replica's checksum. Steps that left a replica stale: {failed}.",
            figures.draw(figures.over_steps(sync, "milliseconds", colour=figures.AMBER, low=0))
            if sync
            else "",
        ),
    ]


def _card(title: str, note: str, body: str) -> str:
    return f'<article class="card"><h2>{title}</h2><p class="note">{note}</p>{body}</article>'


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


def _table(cells: Mapping[str, str]) -> str:
    rows = (
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(value)}</td></tr>" for key, value in cells.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _series(rows: Rows, key: str) -> list[tuple[float, float]]:
    return [(float(row["step"]), float(row[key])) for row in rows if row.get(key) is not None]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
