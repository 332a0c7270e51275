"""What README and docs say in numbers is what the renderer makes of the committed rows, good or bad."""

import pytest

from benchmarks import assisted, readme, readme_learning, readme_trl, rows, stale
from benchmarks.evidence import SUBJECTS
from benchmarks.ranges import listed, overlap, ratio
from benchmarks.readme_learning import LawSummary

README = rows.ROOT / "README.md"


def test_every_measured_figure_is_rendered_from_the_committed_rows():
    assert readme.with_section(README.read_text()) == README.read_text()
    page = readme.PAGE.read_text().removesuffix("\n")
    assert stale.unmarked(readme.measured_page()) == stale.unmarked(page)
    assert assisted.with_table(assisted.PAGE.read_text()) == assisted.PAGE.read_text()
    if rows.has_rows("kernels_compiled"):
        assert readme.with_table(readme.KERNELS.read_text()) == readme.KERNELS.read_text()


def test_every_result_file_is_named_for_its_subject_and_bears_the_package_commit():
    for path in rows.RESULTS.glob("*.jsonl"):
        assert path.stem.partition("_")[0] in SUBJECTS
        assert all({"commit", "package_commit", "machine"} <= row.keys() for row in rows.read(path.stem))


def test_provenance_names_the_last_commit_of_the_package():
    known = rows.provenance()
    assert (known["package_commit"] or "").startswith(rows.last_commit("blockroll"))
    assert "cores" in known["machine"]


def test_rows_are_stale_once_a_package_of_their_subject_has_changed():
    """Of the commits that changed the samplers: before the last, rows on the law are stale; after it not."""
    last = rows.last_commit("blockroll/samplers")
    if not rows.git("rev-parse", "--verify", "--quiet", f"{last}~1"):
        pytest.skip("needs the repository's history")
    assert "samplers" not in stale.changed_since("law_texts", last)
    assert "samplers" in stale.changed_since("law_texts", f"{last}~1")
    assert "**stale**: " in stale.mark("law_texts", [{"package_commit": f"{last}~1"}])
    assert stale.changed_since("law_texts", "0" * 12) == ["?"]
    assert stale.DEPENDS.keys() == set(SUBJECTS)


def trl_row(generate, step, batch=2):
    conversion = {"minutes": 3.0}
    return {"batch": batch, "generate_ratio": generate, "step_ratio": step, "conversion": conversion}


def test_step_time_stands_beside_generation_time_and_a_range_that_holds_one_is_no_difference():
    clear = [trl_row(0.4, 0.9), trl_row(0.5, 1.1)]
    text = readme_trl.stock_finding(clear, clear)
    assert "generating takes 0.45x of the stock trainer's time" in text
    assert "a whole step 1.00x (no difference: its range holds 1)" in text


def law(*held_out):
    return LawSummary(rewards=[[0.0]], acceptance=[], effective=1.0, held_out_rewards=[*held_out])


def test_overlapping_ranges_are_called_no_difference(monkeypatch):
    names = ("plain", "lossless", "mixed, corrected", "mixed, uncorrected")
    laws = dict(zip(names, (law(0.5, 0.6), law(0.59, 0.7), law(0.3, 0.4), law(0.1, 0.2)), strict=True))
    monkeypatch.setattr(readme_learning, "laws_summary", lambda: laws)
    text = readme_learning.laws_finding()
    assert text.endswith(" The ranges of plain and lossless overlap: no difference was shown.")
    assert text.count("overlap") == 1
    runs = [
        {"steps": 2, "is_aligned": is_aligned, "rollout/acceptance_rate": [0.5] * 10 + [last] * 10}
        for is_aligned, last in ((True, 0.6), (False, 0.4))
    ]
    assert "**Drafts can follow the policy.**" in readme_trl.alignment_finding(runs)
    same = [{**run, "rollout/acceptance_rate": [0.5] * 20} for run in runs]
    assert "**Alignment made no difference here.**" in readme_trl.alignment_finding(same)


def test_ranges_overlap_where_they_share_a_value():
    assert overlap([1, 3], [3, 4])
    assert overlap([1, 9], [3, 4])
    assert not overlap([1, 2], [3, 4])
    assert ratio([0.5]) == "0.50x"
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
