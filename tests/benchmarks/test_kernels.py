"""What is said of compiled kernels, of rows good and bad."""

from benchmarks.readme_kernels import compiled_table

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
