"""A short form of the experiments on speed."""

from benchmarks import cells, peers, speed
from benchmarks.workload import prompts


def test_speed_rows_hold_every_subject(policy):
    rows = speed.drafted_speed(policy, batches=(2,), repeats=1)
    assert [row["plan"] for row in rows] == ["plain", "two_forward(8)", "transformers_generate"]
    assert all(row["tokens_per_s"] > 0 for row in rows)


SMALL = {"prompts": "worked", "batch": 2, "temperature": 1.0, "repeats": 1, "against": ("generate_process",)}


def test_peers_have_rows_of_every_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "FOLDER", tmp_path)
    prompt_makers = {"worked": lambda policy: prompts(policy, 4)}
    rows = peers.measure(
        [peers.Cell(**SMALL, shape="even"), peers.Cell(**SMALL)],
        "tiny",
        prompts=prompt_makers,
        max_tokens=4,
        dtype="float32",
    )
    subjects = ["plain", "auto", "transformers_generate_process"]
    assert [(row["workload"], row["plan"]) for row in rows] == [
        (workload, plan) for workload in ("even", "grouped") for plan in subjects
    ]
    assert all(row["tokens_per_cpu_s"] > 0 and row["prompts"] == "worked" for row in rows)
    assert len(list((tmp_path / "speed_peers").glob("*.json"))) == 2


def test_peers_can_be_started_and_nothing_measured(tmp_path, capsys):
    prompt_makers = {"worked": lambda policy: prompts(policy, 4)}
    peers.start([peers.Cell(**SMALL)], "tiny", prompts=prompt_makers, max_tokens=4, dtype="float32")
    assert "generate_process took" in capsys.readouterr().out


def test_questions_of_gsm8k_are_left_out_by_name_where_there_is_no_file(tmp_path, capsys):
    found, _ = peers.every_cell(tmp_path / "gsm8k.jsonl")
    assert {cell.prompts for cell in found} == {"chat", "worked"}
    assert "GSM8K is left out: no" in capsys.readouterr().out
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "How many?"}')
    found, _ = peers.every_cell(tmp_path / "gsm8k.jsonl")
    assert len({cell.name for cell in found}) == len(found) == 11
