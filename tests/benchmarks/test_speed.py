"""A short form of the experiments on speed."""

import json

from benchmarks import peers, speed
from benchmarks.workload import prompts


def test_speed_rows_hold_every_subject(policy):
    rows = speed.drafted_speed(policy, batches=(2,), repeats=1)
    assert [row["plan"] for row in rows] == ["plain", "two_forward(8)", "transformers_generate"]
    assert all(row["tokens_per_s"] > 0 for row in rows)


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


def test_peers_can_be_started_and_nothing_measured(tmp_path, capsys):
    prompt_makers = {"worked": lambda policy: prompts(policy, 4)}
    peers.start([peers.Cell(**SMALL)], "tiny", prompts=prompt_makers, max_tokens=4, dtype="float32")
    assert "generate_process took" in capsys.readouterr().out


def test_questions_of_gsm8k_are_left_out_by_name_where_there_is_no_file(tmp_path, capsys):
    cells, _ = peers.every_cell(tmp_path / "gsm8k.jsonl")
    assert {cell.prompts for cell in cells} == {"chat", "worked"}
    assert "GSM8K is left out: no" in capsys.readouterr().out
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "How many?"}')
    cells, _ = peers.every_cell(tmp_path / "gsm8k.jsonl")
    assert len({cell.name for cell in cells}) == len(cells) == 11
