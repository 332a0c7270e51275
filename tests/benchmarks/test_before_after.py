"""Two commits are measured in pairs, and what was measured is not measured again."""

import pytest

from benchmarks import before_after, host, readme_speed, rows


@pytest.fixture(scope="module")
def commit():
    commit = rows.git("rev-parse", "--short=12", "HEAD")
    if not commit:
        pytest.skip("needs the repository's history")
    return commit


@pytest.mark.slow
def test_every_kind_of_work_has_a_row_and_a_run_goes_on_where_it_stopped(commit, tmp_path):
    found, is_whole = before_after.run(commit, commit, folder=tmp_path, short=True, minutes=0)
    assert (found, is_whole) == ([], False)
    found, is_whole = before_after.run(commit, commit, folder=tmp_path, short=True)
    assert is_whole
    assert [row["what"] for row in found if "plan" not in row] == [
        "admission of 8 texts, twice",
        "a text of 40 tokens with stop strings",
        "4 prompts of a file of 50",
    ]
    assert [(row["plan"], row["batch"]) for row in found if "plan" in row] == [
        ("plain", 1),
        ("two_forward(8)", 1),
        ("plain", 2),
        ("two_forward(8)", 2),
    ]
    for row in found:
        assert row["before_s"] > 0
        assert row["time_ratio_low"] <= row["time_ratio"] <= row["time_ratio_high"]
    assert before_after.run(commit, commit, folder=tmp_path, short=True) == (found, True)
    table = readme_speed.before_after_table([{**row, **rows.provenance()} for row in found])
    assert "| a token | tiny | two_forward(8) | 2 | " in table
    assert f"by commits {commit} and {commit}" in table


def test_a_worker_that_ends_is_an_error_and_a_commit_that_is_none_is_named(commit, tmp_path):
    checkout = before_after.unpacked(commit, tmp_path)
    with before_after.Worker(checkout) as worker, pytest.raises(RuntimeError, match="ended with status 1"):
        worker.ask(measure="no such thing")
    with pytest.raises(SystemExit, match="no commit 'nonsense' in this repository"):
        before_after.unpacked("nonsense", tmp_path)


@pytest.mark.slow
def test_parts_of_a_step_are_measured_of_both_and_a_run_goes_on_where_it_stopped(commit, tmp_path):
    found, is_whole = host.run(commit, commit, folder=tmp_path, short=True)
    assert is_whole
    assert len(found) == 2 * len(host.PLANS) + 2 * len(host.OPTIONS)
    for row in found:
        assert row["host_ms_after"] + row["sampler_ms_after"] < row["step_ms_after"]
        assert row["sampler_ratio_low"] <= row["sampler_ratio"] <= row["sampler_ratio_high"]
    assert host.run(commit, commit, folder=tmp_path, short=True) == (found, True)
