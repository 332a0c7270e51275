"""The README's examples run and its links lead somewhere."""

import re
import tomllib
from pathlib import Path

import pytest

from blockroll.policies.loading import TINY_POLICY_DIR
from tests.command_line import save_random_policy

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()


def python_blocks():
    return re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def run(block):
    exec(compile(block, "README.md", "exec"), {})


def test_the_first_example_is_short_and_runs(capsys):
    block = python_blocks()[0]
    assert len(block.splitlines()) <= 12
    run(block)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4
    assert all(re.fullmatch(r"'.*' \d\.\d\d of drafts accepted", line) for line in printed)


def test_the_first_example_runs_on_a_checkpoint_folder_that_cannot_draft(tmp_path, capsys):
    path = save_random_policy(tmp_path / "model", can_draft=False)
    run(python_blocks()[0].replace('"tiny")', f"{path!r})"))
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_model_of_ones_own_is_loaded_checked_converted_and_used_in_ten_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_random_policy(tmp_path / "DIR", can_draft=False)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1=?"}\n{"prompt": "2+3=?"}\n')
    block = python_blocks()[1]
    assert len([line for line in block.splitlines() if line]) <= 10
    assert "max_minutes=30" in block
    run(block.replace("max_minutes=30", "max_minutes=0.02, completion_tokens=8"))
    printed = capsys.readouterr().out
    assert "The policy keeps the contract" in printed
    assert (tmp_path / "adapter/draft_adapter.json").is_file()
    # Under `auto` a text may be decoded plainly: nothing was drafted then.
    assert len(re.findall(r"^(['\"]).*\1 (?:\d\.\d+|nan)$", printed, re.MULTILINE)) == 4


def test_the_extras_that_the_install_line_names_are_those_of_the_package():
    line = re.search(r"pip install .*", TEXT)[0]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.search(r"extras: ([a-z, ]+);", line)[1].split(", ")
    assert set(named) == set(extras) - {"dev", "all"}


def test_the_shipped_policy_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in TINY_POLICY_DIR.iterdir()) <= 6 * 2**20


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)]+)\)", TEXT))
def test_every_link_of_the_readme_leads_somewhere(link):
    assert (ROOT / link).exists()
