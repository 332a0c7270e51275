"""A short form of the experiments on speed."""

import json

from benchmarks import peers, speed
from benchmarks.readme_speed import peers_table
from benchmarks.workload import prompts


def test_speed_rows_hold_every_subject(policy):
    rows = speed.drafted_speed(policy, batches=(2,), repeats=1)
    assert [row["plan"] for row in rows] == ["plain", "two_forward(8)", "transformers_generate"]
    assert all(row["tokens_per_s"] > 0 for row in rows)


def test_auto_has_rows_beside_plain_and_transformers(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "RUNS", tmp_path)
    monkeypatch.setenv("BLOCKROLL_CACHE", str(tmp_path))  # put back afterwards
    rows = speed.auto(adapter, batches=(2,), repeats=1, rollouts=4)
    assert [row["plan"] for row in rows] == [
        "plain",
        "two_forward(8)",
        "fused(8,[0,8])",
        "auto",
        "transformers_generate",
    ]
    assert list((tmp_path / "cache" / "plans").glob("*.json"))


SMALL = {"prompts": "worked", "batch": 2, "temperature": 1.0, "repeats": 1, "against": ("generate_process",)}


def test_peers_have_rows_of_every_cell_and_a_cell_is_measured_once(tmp_path, capsys):
    """What is kept of another commit is measured again, and nothing begins after the deadline."""
    even = peers.Cell(**SMALL, shape="even")
    grouped = peers.Cell(**SMALL)
    settings = {
        "folder": "tiny",
        "prompts": {"worked": lambda policy: prompts(policy, 4)},
        "kept": tmp_path,
        "max_tokens": 4,
        "dtype": "float32",
    }
    rows = peers.measure([even, grouped], **settings)
    subjects = ["plain", "auto", "transformers_generate_process"]
    assert [(row["workload"], row["plan"]) for row in rows] == [
        (workload, plan) for workload in ("even", "grouped") for plan in subjects
    ]
    assert all(row["tokens_per_cpu_s"] > 0 and row["prompts"] == "worked" for row in rows)
    assert peers.measure([even, grouped], **settings) == json.loads(json.dumps(rows))

    (path,) = tmp_path.glob("even-*")
    path.write_text(json.dumps({"commit": "another", "rows": []}))
    again = peers.measure([even, grouped], **settings, deadline=0.0)
    assert [row["workload"] for row in again] == ["grouped"] * 3
    assert f"{even.name} is left out: there is no time for it" in capsys.readouterr().out


def test_questions_of_gsm8k_are_left_out_by_name_where_there_is_no_file(tmp_path, capsys):
    cells, _ = peers.every_cell(tmp_path / "gsm8k.jsonl")
    assert {cell.prompts for cell in cells} == {"chat", "worked"}
    assert "GSM8K is left out: no" in capsys.readouterr().out
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "How many?"}')
    cells, _ = peers.every_cell(tmp_path / "gsm8k.jsonl")
    assert len({cell.name for cell in cells}) == len(cells) == 11


def test_the_table_of_peers_says_ratios_of_repeats_and_what_was_not_measured():
    figures = {"dtype": "bfloat16", "threads": 1, "machine": "a machine", "temperature": 1.0, "max_tokens": 4}
    figures |= {"repeats": 2, "transformers_version": "5", "commit": "abc", "batch": 8, "skipped": None}
    ours = {"plan": "plain", "version": None, "setup_s": 1.0, "tokens_per_s": 15.0, "tokens_per_cpu_s": 30.0}
    ours |= {"tokens_per_s_all": (10.0, 20.0), "tokens_per_cpu_s_all": (30.0, 30.0)}
    other = {"plan": "vllm", "version": "vllm 0.32.0", "setup_s": 90.0, "tokens_per_s": 20.0}
    other |= {
        "tokens_per_cpu_s": 40.0,
        "tokens_per_s_all": (20.0, 20.0),
        "tokens_per_cpu_s_all": (60.0, 20.0),
    }
    dead = {"plan": "vllm_ngram(5)", "version": None, "setup_s": None}
    table = peers_table([figures | ours, figures | other, figures | dead | {"skipped": "it died"}])

    assert "| 8 | `vllm` | 20 | 40 | 0.75x (0.50 to 1.00) | 1.00x (0.50 to 1.50) |" in table
    assert "| 8 | `vllm_ngram(5)` | not measured: it died |" in table
    assert "90 to 90 s, are not counted" in table
    assert "vllm 0.32.0" in table
