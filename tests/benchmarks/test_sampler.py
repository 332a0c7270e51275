"""The sampler's share of a step is measured cell by cell, and a cell that has a row is not measured again."""

from benchmarks import sampler
from blockroll.types import PLAIN, Plan


def test_every_cell_has_a_row_with_its_range_and_is_measured_once(tmp_path, policy, monkeypatch):
    cells = [*sampler.cells((1, 2), (PLAIN, Plan(4)), ({}, {"top_p": 0.9}))]
    num_mixed = len(sampler.MIXED_SAMPLINGS)
    assert len(cells) == 2 * 2 * 2 + 2 * num_mixed  # and a mixed law for each batch
    path = tmp_path / "rows.jsonl"
    first = sampler.run(policy, cells[:2], path, minutes=1, waves=1, tokens=3)
    asked = []
    monkeypatch.setattr(
        sampler, "measured", lambda policy, cell, **_: asked.append(cell) or {**cell.about, **SHARES}
    )
    found = sampler.run(policy, cells, path, minutes=1)
    assert asked == cells[2:]
    assert found[:2] == first
    assert all(row["share_low"] <= row["share"] <= row["share_high"] < 1 for row in found)


SHARES = {"share": 0.1, "share_low": 0.1, "share_high": 0.1}
