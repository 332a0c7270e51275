"""What CONTRIBUTING.md says of places is there, and the lowest versions are those that are promised."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
TABLE = PAGE[PAGE.index("## Where a change goes") : PAGE.index("Imports point down")]
NEW = re.compile(r"<\w+>")  # in the name of a file or folder that a change makes


def rows(table):
    """By what is to be done, the cell that says what to touch."""
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", table, re.MULTILINE)[2:])


def missing(cell):
    """Files and folders of a cell that there are not; of a new one, the folder it is put in."""
    lacking = []
    for name in re.findall(r"`([\w./<>-]+)`", cell):
        if "/" not in name and not name.endswith((".toml", ".txt")):
            continue
        place = name[: match.start()].rpartition("/")[0] if (match := NEW.search(name)) else name
        if not any((base / place).exists() for base in (ROOT, ROOT / "blockroll")):
            lacking.append(name)
    return lacking


def undefined(cell):
    """Names that a cell puts into a file which does not have them."""
    pairs = re.findall(r"`([A-Za-z_.]+)` (?:of|in|that) `([\w/]+\.py)`", cell)
    return [name for name, file in pairs for part in name.split(".") if part not in source_of(file)]


def source_of(file):
    return "".join(path.read_text() for base in (ROOT, ROOT / "blockroll") if (path := base / file).exists())


def test_every_place_of_the_table_is_there():
    cells = rows(TABLE)
    assert len(cells) >= 11
    assert {row: found for row, cell in cells.items() if (found := missing(cell) + undefined(cell))} == {}


def test_a_planted_place_that_is_not_there_is_named():
    assert missing("`policies/lading.py`, `rollouts/<kind>.py` and `rollout/<kind>.py`") == [
        "policies/lading.py",
        "rollouts/<kind>.py",
    ]
    assert undefined("a line in `FAMILYS` of `policies/loading.py`") == ["FAMILYS"]


def test_the_lowest_versions_are_those_that_are_promised():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    promised = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(lines), re.MULTILINE))
    text = (ROOT / "constraints-lowest.txt").read_text()
    tested = dict(re.findall(r"^([\w-]+)==([\d.]+)$", text, re.MULTILINE))
    others = {
        name: (version, tested.get(name))
        for name, version in promised.items()
        if not f"{tested.get(name)}.".startswith(f"{version}.")
    }
    assert others == {}
