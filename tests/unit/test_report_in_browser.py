"""The report as a real browser lays it out: nothing cut, nothing over anything else, all of it legible."""

import pytest

from blockroll.rl_loops.report import write_report
from tests.browser import FAULTS, FOUND, browser
from tests.sweep_rows import sweep_rows
from tests.unit.test_report import SAMPLE, SPEED, run_folder
from tests.watch_rows import SAID, guarded_rows, plain_row

pytestmark = pytest.mark.skipif(FOUND is None, reason="needs a Chromium: apt-get install chromium")
UNBROKEN = {**SAMPLE, "prompt": "1+" * 200, "completion": "x" * 400}


@pytest.fixture(scope="module")
def tab():
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """By what the run had: the report of one that a guard watched, and of one that decoded plain."""
    folder = tmp_path_factory.mktemp("pages")
    rows = guarded_rows()
    rows[-1] |= {"eval/reward": 0.6, "rollout/failed_total": 3.0, "engine/redispatch_total": 7.0}
    rows[0]["eval/initial_reward"] = 0.41
    nothing = {"rollout/acceptance_rate": None, "rollout/tokens_per_forward": 1.0, "reward": None}
    runs = {
        "guarded": run_folder(folder / ("a_name_" * 9), rows, [SAMPLE, UNBROKEN], SPEED, sweep_rows()),
        "plain": run_folder(folder / "plain", [plain_row(1, plan="plain", **nothing)]),
    }
    return {name: write_report(run) for name, run in runs.items()}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("run", ["guarded", "plain"])
def test_everything_is_legible_and_in_its_place(tab, pages, run, width, scheme):
    tab.open(pages[run], width=width, scheme=scheme)
    assert tab.evaluate(FAULTS) == []


def test_the_guards_words_are_seen_on_the_first_screen_of_a_phone(tab, pages):
    tab.open(pages["guarded"], width=400, scheme="light")
    place = "[...document.querySelectorAll('.story p')].find(p => p.textContent.includes(%r))" % SAID[:40]  # noqa: UP031
    assert tab.evaluate(f"{place}.getBoundingClientRect().bottom") < 900


def test_the_scheme_is_that_of_the_screen(tab, pages):
    paper = {}
    for scheme in ("light", "dark"):
        tab.open(pages["plain"], width=400, scheme=scheme)
        paper[scheme] = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(246, 247, 249)", "dark": "rgb(20, 24, 31)"}


@pytest.mark.parametrize(
    ("style", "found"),
    [
        ("main { width: 900px }", "the page is 900 px wide"),
        (".tile { margin-top: -60px }", "lies over"),
        (".note { color: #bbb }", "has a contrast of"),
        ("svg text { fill: #999 !important }", "has a contrast of"),
        (".note { font-size: 7px }", "is 7.0 px high"),
        (".tile span { position: relative; left: 170px }", "leaves its"),
        ("svg { max-width: 200px !important }", "px high"),
    ],
)
def test_a_planted_fault_is_found(tab, pages, style, found):
    tab.open(pages["guarded"], width=400, scheme="light")
    tab.evaluate(f"document.head.insertAdjacentHTML('beforeend', '<style>{style}</style>')")
    assert any(found in fault for fault in tab.evaluate(FAULTS))
