"""Threads, the cache folder of each test, and the one Ray cluster of a test session."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from blockroll.config import cache_dir
from blockroll.kernels.choice import Form
from blockroll.policies.base import Policy
from blockroll.rollout.engine import engine
from blockroll.rollout.engine.cache.contract import Cache
from blockroll.rollout.engine.cache.layouts import PAGE_SIZE, Layout, make_cache
from tests import machines, rounding

torch.set_num_threads(int(os.environ.get(machines.THREADS, "1")))
if machines.ROUNDING in os.environ:
    rounding.disturb()
# Ray's workers are nice by default, and starve where another process runs tests on every core.
os.environ.setdefault("RAY_worker_niceness", "0")
# A shell starts what runs in its background with SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


SLOW_S = 10.0
KERNELS = cache_dir() / "kernels"  # by what they were built of, so that they are built once
EXPERIMENTS = Path(__file__).parent / "benchmarks"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Experiments are slow; tests marked `gpu` are skipped, by name, where there is none."""
    for item in items:
        if EXPERIMENTS in item.path.parents:
            item.add_marker(pytest.mark.slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names tests that took over ten seconds and are not marked `slow`: on an idle machine, mark them."""
    took = (report for report in terminalreporter.getreports("passed") if report.when == "call")
    long = [report for report in took if report.duration > SLOW_S and "slow" not in report.keywords]
    if long:
        terminalreporter.section(f"over {SLOW_S:g} s and not marked slow")
        for report in sorted(long, key=lambda each: -each.duration):
            terminalreporter.line(f"{report.duration:6.1f}s {report.nodeid}")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads what another process has measured, or leaves anything but compiled code."""
    folder = tmp_path_factory.mktemp("cache")
    KERNELS.mkdir(parents=True, exist_ok=True)
    (folder / KERNELS.name).symlink_to(KERNELS)
    monkeypatch.setenv("BLOCKROLL_CACHE", str(folder))
    return folder


@pytest.fixture(params=["slots", "pages"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How caches lie in memory where nobody says; pages are small, so that there are many."""
    if request.param == "pages":
        monkeypatch.setattr(engine, "make_cache", in_small_pages)
    return str(request.param)


def in_small_pages(policy: Policy, layout: Layout, form: Form, *, page_size: int, max_rows: int) -> Cache:
    assert (layout, page_size) == ("auto", PAGE_SIZE), "the test says itself how its cache lies"
    return make_cache(policy, "pages", form, page_size=4, max_rows=max_rows)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local cluster; pools that find it running leave it running."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
