"""The report: one file that needs nothing else, whatever a run has or lacks."""

import html
import json
import re
from html.parser import HTMLParser

import pytest
import yaml

from blockroll.bench.frontier import conclusion, to_record
from blockroll.config import RunConfig, to_mapping
from blockroll.errors import InvalidInput
from blockroll.rl_loops.report import write_report
from blockroll.rl_loops.watch.rows import evaluations
from tests.sweep_rows import sweep_rows
from tests.watch_rows import SAID, TESTS, guarded_rows, plain_row

VOID = {"meta", "br", "link", "path", "use", "rect"}


def run_folder(path, rows, samples=(), speed=None, sweep=()):
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(to_mapping(RunConfig())))
    for name, lines in (("metrics.jsonl", rows), ("rollouts.jsonl", samples)):
        (path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if speed is not None:
        (path / "speed.json").write_text(json.dumps(speed))
    if sweep:
        (path / "sweep.jsonl").write_text("".join(json.dumps(to_record(row)) + "\n" for row in sweep))
    return path


class Balance(HTMLParser):
    """Fails on a tag that closes what is not open."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, tag


def page(folder):
    text = write_report(folder).read_text(encoding="utf-8")
    balance = Balance()
    balance.feed(text)
    assert balance.open == []
    return text


SPEED = [
    {"plan": "plain", "batch": 1, "tokens_per_s": 100.0, "tokens_per_s_all": [99.0, 100.0, 101.0]},
    {"plan": "two_forward(8)", "batch": 1, "tokens_per_s": 250.0, "tokens_per_s_all": [240.0, 250.0, 260.0]},
]
SAMPLE = {
    "step": 1,
    "prompt": "1<2&3",
    "completion": "<script>alert(1)</script>",
    "reward": 1.0,
    "num_tokens": 5,
    "num_accepted": 3,
    "finish_reason": "stop",
}


def test_a_whole_run_makes_a_page_with_six_figures_and_no_link_to_elsewhere(tmp_path):
    rows = [plain_row(1, **{"eval/initial_reward": 0.4}), plain_row(2), plain_row(3, **{"eval/reward": 0.7})]
    text = page(run_folder(tmp_path / "demo", rows, [SAMPLE], SPEED))
    assert text.count("<svg") == 6
    assert "2.50×" in text  # noqa: RUF001
    assert "0.400 → 0.700" in text
    # Names of XML namespaces are no links.
    addresses = set(re.findall(r"""(?:src|href)=["'](?!#|data:)([^"']*)""", text))
    assert addresses == set()
    assert set(re.findall(r"https?://[^\s\"'<)]*", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_what_a_guard_watched_is_drawn_and_told_at_the_top(tmp_path):
    text = page(run_folder(tmp_path / "demo", guarded_rows(60, 40)))
    assert text.index(SAID) < text.index('class="tiles"')
    cards = re.findall(r"<article[^>]*><h2>([^<]*)</h2>(.*?)</article>", text, re.DOTALL)
    drawn = {title for title, body in cards if "<svg" in body}
    assert {"Evidence", "Reward difference", "Acceptance by position", "Reward against acceptance"} <= drawn
    rows_of_tests = re.findall(r'<td><i class="swatch"[^>]*></i>([^<]*)</td>', dict(cards)["Evidence"])
    assert sorted(rows_of_tests) == sorted(TESTS)


def test_a_sweep_beside_the_run_is_drawn_with_what_it_concludes(tmp_path):
    rows = sweep_rows()
    folder = run_folder(tmp_path / "demo", [plain_row(1)], sweep=rows)
    text = page(folder)
    cards = dict(re.findall(r"<article[^>]*><h2>([^<]*)</h2>(.*?)</article>", text, re.DOTALL))
    assert cards["Frontier"].count("<svg") == 2
    assert html.escape(conclusion(rows)[0]) in cards["Frontier"]
    listed = re.findall(r'<i class="swatch"[^>]*></i>([^<]*)</td><td>([^<]*)<', cards["Frontier"])
    assert listed == [("plain", "1"), *(("two_forward(8)", each) for each in ("1", "0.75", "0.5", "0.25"))]
    assert cards["Frontier"].count("<b>") == 1

    lines = (folder / "sweep.jsonl").read_text().splitlines()
    (folder / "sweep.jsonl").write_text(lines[0].replace('"difference"', '"other"') + "\n")
    with pytest.raises(InvalidInput, match="has no 'difference'"):
        write_report(folder)


def test_texts_of_the_policy_are_shown_and_never_run(tmp_path):
    text = page(run_folder(tmp_path / "demo", [plain_row(1)], [SAMPLE]))
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "1&lt;2&amp;3" in text


def test_a_plain_run_without_speed_or_evaluation_says_so_instead_of_drawing(tmp_path):
    text = page(
        run_folder(tmp_path / "demo", [plain_row(1, plan="plain", **{"rollout/acceptance_rate": None})])
    )
    assert "Plain decoding drafts nothing" in text
    assert "Not measured in this run" in text
    assert text.count("<svg") == 3


def test_evaluations_start_at_the_policy_the_run_started_from():
    rows = [plain_row(1, **{"eval/initial_reward": 0.4}), plain_row(2, **{"eval/reward": 0.6}), plain_row(3)]
    assert evaluations(rows) == [(0.0, 0.4), (2.0, 0.6)]


def test_writing_twice_gives_the_same_page(tmp_path):
    folder = run_folder(tmp_path / "demo", [plain_row(1), plain_row(2)], [SAMPLE], SPEED)
    assert page(folder) == page(folder)


def test_a_folder_without_a_finished_step_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="no finished step"):
        write_report(run_folder(tmp_path / "empty", []))
