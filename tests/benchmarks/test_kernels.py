"""What is said of compiled kernels, of rows good and bad, and of the memory of log-probabilities."""

import json

import pytest

from benchmarks.logprob_memory import AT_ONCE, IN_PIECES, logprob_memory
from benchmarks.readme_kernels import compiled_table, logprob_memory_table

ROW = {
    "op": "block_verify",
    "kernel": "accept",
    "label": "accept fp32",
    "target": "gfx942",
    "triton": "3.7.1",
    "registers": 40,
    "occupancy": 8,
    "shared": 2048,
    "problems": [],
}


def test_a_kernel_has_the_ranges_of_its_configurations_on_each_gpu():
    nvidia = {key: value for key, value in ROW.items() if key != "occupancy"} | {"target": "sm_90"}
    rows = [ROW, {**ROW, "triton": "3.6.0", "registers": 61, "occupancy": 7}, nvidia]
    table = compiled_table(rows)
    assert "| block_verify | `accept` | 1 | 40 to 61 (7), 2 | 40, 2 |" in table
    assert "by Triton 3.7.1 and 3.6.0, without a GPU. Nothing spills, and all fit." in table


def test_what_does_not_fit_is_named():
    table = compiled_table([ROW, {**ROW, "label": "accept bf16", "problems": ["spills is 12"]}])
    assert "1 of them do not fit: accept bf16 on gfx942 with Triton 3.7.1 (spills is 12)." in table
    assert "Nothing spills" not in table


def test_memory_of_each_token_grows_with_the_vocabulary_only_where_all_logits_are_there():
    tokens = {AT_ONCE: (256, 512), IN_PIECES: (1_024, 2_048)}
    found = {(row["way"], row["vocabulary"]): row for row in logprob_memory((16_000, 64_000), tokens)}
    small, large = (found[AT_ONCE, size]["bytes_per_token"] for size in (16_000, 64_000))
    assert large / small == pytest.approx(4, rel=0.3)
    assert large > 8 * 64_000
    for size in (16_000, 64_000):
        assert found[IN_PIECES, size]["bytes_per_token"] < 0.02 * small
    table = logprob_memory_table([*found.values()])
    assert "| all logits at once | " in table
    assert "The bound is 256 MiB" in table
    json.dumps([*found.values()])
