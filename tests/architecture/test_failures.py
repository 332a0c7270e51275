"""docs/failures.md and the marks of the tests say the same."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"\| (\d+) \| .* \| (tested, planted|tested|cannot occur[^|]*) \|")
GROUPS = {*range(18, 57), *range(86, 94)}  # log-probabilities, samplers, streams, numerics


def stated() -> dict[int, str]:
    rows = ROW.findall((ROOT / "docs" / "failures.md").read_text())
    return {int(number): verdict for number, verdict in rows}


def numbers(pattern: str, paths) -> set[int]:
    return {int(number) for path in paths for number in re.findall(pattern, path.read_text())}


def test_every_failure_of_the_groups_has_a_row_with_a_verdict():
    assert set(stated()) == GROUPS


def test_marks_and_verdicts_agree():
    marked = numbers(r"mark\.failure\((\d+)\)", (ROOT / "tests").rglob("test_*.py"))
    planted = numbers(r"@failure\((\d+), \w+\)", (ROOT / "tests" / "law").glob("failures_of_*.py"))
    verdicts = stated()
    assert planted == {number for number, verdict in verdicts.items() if verdict == "tested, planted"}
    assert (marked | planted) == {number for number, verdict in verdicts.items() if "tested" in verdict}
