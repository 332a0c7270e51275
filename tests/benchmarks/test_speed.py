"""A short form of the experiments on speed."""

from benchmarks import speed


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
