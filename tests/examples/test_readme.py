"""The README's first example runs and its links lead somewhere."""

import re
from pathlib import Path

import pytest

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


def test_the_shipped_policy_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in TINY_POLICY_DIR.iterdir()) <= 6 * 2**20


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)]+)\)", TEXT))
def test_every_link_of_the_readme_leads_somewhere(link):
    assert (Path(__file__).parents[2] / link).exists()
