"""The README is run and held against the rows."""

import re
from pathlib import Path

import pytest

from benchmarks import readme, readme_learning
from benchmarks.rows import read
from blockroll.policies.loading import TINY_POLICY_DIR

TEXT = (Path(__file__).parents[2] / "README.md").read_text()


def first_python_block():
    return re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1]


def test_the_first_python_block_is_short_and_runs(capsys):
    block = first_python_block()
    assert len(block.splitlines()) <= 12
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4
    assert all(re.fullmatch(r"'.*' \d\.\d\d of drafts accepted", line) for line in printed)


def test_every_measured_figure_comes_from_a_committed_row():
    assert readme.with_section(TEXT) == TEXT
    assert readme.measured_page() + "\n" == readme.PAGE.read_text()


def test_the_rows_show_what_part_one_promises():
    cells = {(row["plan"], row["batch"]): row for row in read("part1_speed")}
    assert {batch for _, batch in cells} == {1, 4, 16, 64}
    assert all(
        row["repeats"] >= 5 and row["host_ms_per_step"] for row in cells.values() if row["host_ms_per_step"]
    )
    assert cells["two_forward(8)", 1]["speedup_over_plain"] >= 2
    for ends in readme_learning.learning_summary().values():
        assert len(ends) == 3
        assert all(last - first >= 0.15 for first, last in ends)
    assert readme_learning.band_overlap() > 0.8
    assert all(row["max_difference"] < 1e-4 for row in read("part1_logprobs"))
    assert all(row["p_value"] > 0.001 for row in read("part1_law"))


def test_the_rows_show_what_part_two_promises():
    auto = {row["batch"]: row for row in read("part2_auto") if row["plan"] == "auto"}
    assert set(auto) == {1, 4, 16, 64}
    assert all(row["repeats"] >= 5 and row["speedup_over_plain"] >= 0.95 for row in auto.values())
    assert auto[1]["speedup_over_plain"] >= 2
    equality = read("part2_equality")
    assert sum("differing_rollouts_all_at_ties" in row for row in equality) == 4
    assert all(row["p_value"] > 0.001 for row in equality if "p_value" in row)
    laws = readme_learning.laws_summary()
    assert len(laws) == 4
    assert all(len(law.rewards) == len(law.held_out_rewards) == 3 for law in laws.values())
    for name in ("plain", "lossless"):
        assert laws[name].effective == pytest.approx(1, abs=1e-6)
    logits, texts = (row for row in read("part2_smollm2") if "check" in row)
    assert logits["equal"]
    assert texts["p_value"] > 0.001


def test_the_shipped_policy_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in TINY_POLICY_DIR.iterdir()) <= 6 * 2**20


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)]+)\)", TEXT))
def test_every_link_of_the_readme_leads_somewhere(link):
    assert (Path(__file__).parents[2] / link).exists()
