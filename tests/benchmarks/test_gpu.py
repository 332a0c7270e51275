"""What `make gpu` measures, in small and interpreted: every case runs, and gives the numbers asked for."""

import json
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("interprets kernels, in a process of its own", allow_module_level=True)

from benchmarks import gpu


@pytest.mark.parametrize("part", gpu.PARTS)
def test_a_part_runs_and_its_rows_say_what_was_measured(part):
    roof, *found = gpu.measure([part], gpu.SMALL, torch.device("cpu"), repeats=1)
    assert roof["bytes_per_s"] > 0
    assert found
    json.dumps(found)
    for row in found:
        assert row["kernels"].startswith("triton"), row
        for name, value in row.items():
            assert value is None or not isinstance(value, float) or value >= 0, name
    if part == "attention":
        assert max(row["largest_gap"] for row in found) < 0.05
