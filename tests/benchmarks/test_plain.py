"""Plain steps are timed in pairs, of the same prompts, with every ratio beside its range."""

import pytest

from benchmarks import plain, rows
from blockroll.policies.hf import HFPolicy


def test_a_row_has_the_time_of_each_and_ratios_with_their_range():
    compiled, packed = HFPolicy.from_pretrained("tiny"), HFPolicy.from_pretrained("tiny", compile="off")
    row = plain.measured(compiled, packed, name="tiny", batch=2, pairs=2, tokens=3)
    assert (row["policy"], row["dtype"], row["batch"], row["pairs"]) == ("tiny", "float32", 2, 2)
    assert all(row[f"{name}_cpu_ms"] > 0 for name in ("compiled", "packed", "generate", "floor"))
    for key in ("compiled_to_generate", "compiled_to_packed", "compiled_to_floor"):
        assert row[f"{key}_low"] <= row[key] <= row[f"{key}_high"]
    assert packed.compiled.most_rows == 0
    assert packed.model.config._attn_implementation == "blockroll"


@pytest.mark.parametrize("name", plain.RANDOM)
def test_models_with_random_weights_decode(name, monkeypatch):
    monkeypatch.setitem(plain.RANDOM, name, {**plain.RANDOM[name], "vocab_size": 300, "num_hidden_layers": 2})
    policy = HFPolicy(plain.model(name, "bfloat16"))
    assert plain.engine_step_s(policy, [(5, 6, 7)], 3, 0)[1] > 0


def test_a_cell_that_this_commit_has_measured_is_not_begun_again(monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(rows, "provenance", lambda: {"package_commit": "a1"})
    cell = {"policy": "tiny", "dtype": "float32", "threads": 1, "batch": 2}
    assert not plain.is_measured(cell)
    rows.put(plain.RESULT, {**cell, "floor_cpu_ms": 1.0}, same=plain.CELL)
    rows.put(plain.RESULT, {**cell, "batch": 8}, same=plain.CELL)
    rows.put(plain.RESULT, {**cell, "floor_cpu_ms": 2.0}, same=plain.CELL)
    assert [row.get("floor_cpu_ms") for row in rows.read(plain.RESULT)] == [None, 2.0]
    assert plain.is_measured(cell)
    monkeypatch.setattr(rows, "provenance", lambda: {"package_commit": "b2"})
    assert not plain.is_measured(cell)
