"""Metrics for Prometheus: what a real scrape of a real run gets, and the dashboard that asks for it."""

import dataclasses
import importlib.resources
import json
import re
import socket
import sys
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from blockroll.config import WatchConfig
from blockroll.errors import ConfigError, MissingDependency
from blockroll.rl_loops.tracking import read_lines
from blockroll.rl_loops.watch.prometheus import Prometheus, gauge_name, require_prometheus
from tests.runs import config_for, run, save_policy

DASHBOARD = json.loads(
    (importlib.resources.files("blockroll.rl_loops.watch") / "grafana.json").read_text(encoding="utf-8")
)
SELECTOR = re.compile(r'(\w*)\{(?:__name__=~"([^"]+)", )?run=~"\$run"\}')


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def scrape(address):
    """By gauge, its labels and its value."""
    with urllib.request.urlopen(address, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    assert {family.type for family in families} <= {"gauge"}
    return {each.name: (each.labels, each.value) for family in families for each in family.samples}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A guarded run: its rows, and what a scrape got after its second step, while it went on."""
    folder = tmp_path_factory.mktemp("real")
    config = config_for(folder, save_policy(folder / "policy", 0), steps=3, eval_every=1)
    config = dataclasses.replace(
        config,
        metrics_port=free_port(),
        rollout=dataclasses.replace(config.rollout, mix_weight=0.5, watch_every=1),
        watch=WatchConfig(reward="warn", shadow_share=1.0, acceptance_reference=1),
    )
    address, scraped = f"http://127.0.0.1:{config.metrics_port}/metrics", {}

    def fetch(metrics):
        if metrics["step"] == 2:
            scraped.update(scrape(address))

    run(config, callbacks=[fetch])
    with pytest.raises(urllib.error.URLError):
        scrape(address)  # the port is free again
    return read_lines(config.run_dir / "metrics.jsonl"), scraped


def test_a_scrape_of_a_running_run_gets_every_number_of_its_newest_row(real):
    rows, scraped = real
    numbers = {gauge_name(key): value for key, value in rows[1].items() if isinstance(value, int | float)}
    assert len(numbers) > 80
    # The first row has the evaluation before the first update, which is its newest value.
    numbers[gauge_name("eval/initial_reward")] = rows[0]["eval/initial_reward"]
    assert {name: value for name, (_, value) in scraped.items()} == pytest.approx(numbers)
    assert {labels["run"] for labels, _ in scraped.values()} == {"run"}


def expressions():
    return [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]


def lacking(expression, names):
    """Of the selectors of a query, those that no exported gauge answers; it is one, or the ratio of two."""
    assert re.fullmatch(rf"{SELECTOR.pattern}( / {SELECTOR.pattern})?", expression), expression
    return [
        match[0]
        for match in SELECTOR.finditer(expression)
        if not any(re.fullmatch(match[2] or match[1], name) for name in names)
    ]


@pytest.mark.parametrize(("panel", "expression"), expressions())
def test_every_query_of_the_dashboard_is_answered(real, panel, expression):
    assert lacking(expression, real[1]) == []


def test_the_dashboard_has_evidence_of_every_test_of_a_guard(real):
    asked = {match[1] for _, expression in expressions() for match in SELECTOR.finditer(expression)}
    assert {name for name in real[1] if re.fullmatch("blockroll_drift_.*_(log_e|threshold)", name)} <= asked


def test_a_planted_query_that_nothing_answers_is_found(real):
    _, scraped = real
    assert lacking('blockroll_reward{run=~"$run"}', scraped) == []
    assert lacking('blockroll_rewards{run=~"$run"}', scraped) == ['blockroll_rewards{run=~"$run"}']
    ratio = 'blockroll_drift_reward_log_e{run=~"$run"} / blockroll_drift_reward_limit{run=~"$run"}'
    assert lacking(ratio, scraped) == ['blockroll_drift_reward_limit{run=~"$run"}']
    assert len(lacking('{__name__=~"blockroll_rollout_pos_.+", run=~"$run"}', scraped)) == 1


def test_the_dashboard_has_the_shape_that_grafana_loads(real):
    assert DASHBOARD["schemaVersion"] >= 36
    assert "id" not in DASHBOARD  # Grafana gives one
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    cells = [(x, y) for panel in panels for x, y in cells_of(panel["gridPos"])]
    assert len(cells) == len(set(cells))
    assert all(x < 24 for x, _ in cells)
    assert [each["name"] for each in DASHBOARD["templating"]["list"]] == ["datasource", "run"]
    assert DASHBOARD["templating"]["list"][1]["definition"] == "label_values(blockroll_step, run)"
    assert "blockroll_step" in real[1]
    for panel in panels:
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references)) > 0
        assert {each["datasource"]["uid"] for each in (panel, *panel["targets"])} == {"${datasource}"}


def cells_of(place):
    return [
        (x, y)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]


def test_a_gauge_keeps_its_newest_value_and_loses_it_to_a_null():
    exporter = Prometheus(run="a", host="127.0.0.1", port=free_port())
    try:
        exporter.log({"step": 1, "eval/reward": 0.5, "rollout/acceptance_rate": 0.7, "plan": "auto"})
        exporter.log({"step": 2, "rollout/acceptance_rate": None, "loss": float("nan")})
        values = {name: value for name, (_, value) in scrape(exporter.address).items()}
    finally:
        exporter.close()
    assert values == {"blockroll_step": 2, "blockroll_eval_reward": 0.5}


def test_names_of_plans_are_names_of_gauges():
    assert gauge_name("rollout/plan/fused(4,[1])") == "blockroll_rollout_plan_fused_4_1"
    assert gauge_name("drift/calibration/draft_set/log_e") == "blockroll_drift_calibration_draft_set_log_e"


def test_a_port_in_use_is_refused_before_anything_is_loaded(tmp_path):
    config = dataclasses.replace(config_for(tmp_path, tmp_path / "no_policy"), metrics_port=free_port())
    told = rf"metrics_port {config.metrics_port} .*give another port"
    with socket.create_server(("127.0.0.1", config.metrics_port)), pytest.raises(ConfigError, match=told):
        run(config)
    assert not config.run_dir.exists()


def test_the_port_is_of_this_machine_alone_unless_asked(tmp_path):
    assert config_for(tmp_path, "tiny").metrics_host == "127.0.0.1"
    exporter = Prometheus(run="a", host="127.0.0.1", port=free_port())
    try:
        port = int(exporter.address.rpartition(":")[2].partition("/")[0])
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.2", port), timeout=5)
    finally:
        exporter.close()


def test_asking_for_it_without_the_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)  # makes the import fail
    with pytest.raises(MissingDependency, match=r"blockroll\[metrics\]"):
        require_prometheus()
