"""The example of the correctness kit runs in a short form, and so does what its page shows."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

EXAMPLE = Path(__file__).parents[2] / "examples" / "check_assisted_generation.py"
PAGE = Path(__file__).parents[2] / "docs" / "correctness-kit.md"
VERSION = Version(transformers.__version__)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Its rows by check, and what it printed."""
    if Version("5.24") > VERSION:
        pytest.skip(f"the example needs transformers 5.24 or later, this is {VERSION}")
    path = tmp_path_factory.mktemp("assisted") / "rows.jsonl"
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--tokens", "120", "--out", str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    return {row["check"]: row for row in rows}, done.stdout


def test_the_verify_step_of_transformers_is_exact_and_its_float32_within_1e_5(short_run):
    rows, _ = short_run
    own = [row for check, row in rows.items() if check.startswith("_speculative_sampling")]
    assert len(own) == 9
    assert all(row["passed"] for row in own)
    assert all(
        row["statistic"] < 1e-12 for row in own if row["measure"] == "largest difference of probability"
    )


def test_a_law_that_is_documented_to_be_another_is_seen_to_be_another(short_run):
    rows, printed = short_run
    row = rows["ensemble weight 0.5: tokens"]
    assert (row["claim"], row["passed"]) == ("other", False)
    assert "(no target law is promised here)" in printed


@pytest.mark.skipif(Version("5.24.0") != VERSION, reason="what other versions do is theirs to say")
def test_of_the_returned_draft_laws_only_that_of_gemmas_assistant_is_not_the_law_drawn_from(short_run):
    rows, printed = short_run
    broken = {check for check, row in rows.items() if "draft law" in check and not row["passed"]}
    assert broken == {
        "Gemma 4 assistant: returned draft law",
        "Gemma 4 assistant, top_k 4: returned draft law",
    }
    assert not rows["Gemma 4 assistant: first draft, closed form, V = 16"]["passed"]
    assert printed.splitlines()[-1].endswith("'Gemma 4 assistant, top_k 4: returned draft law']")


def test_the_first_python_block_of_the_page_runs(capsys):
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    exec(compile(block, PAGE.name, "exec"), {})
    assert capsys.readouterr().out.startswith("pass  exact law on tables, 2 drafts: the law of 3 tokens")
