"""A short form of the experiments on speed."""

from benchmarks import speed
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


def test_peers_have_rows_beside_plain_and_drafts_from_history(policy):
    rows = speed.against_peers(
        "tiny",
        prompts(policy, 4),
        batches=(2,),
        repeats=1,
        max_tokens=4,
        dtype="float32",
        against=("generate", "generate_process"),
    )
    assert [row["plan"] for row in rows] == [
        "plain",
        "history(5)",
        "transformers_generate",
        "transformers_generate_process",
    ]
    assert all(row["tokens_per_cpu_s"] > 0 and row["mean_length"] == 4 for row in rows)
