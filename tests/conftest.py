"""Threads, the cache folder of each test, and the one Ray cluster of a test session."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import machines, rounding

torch.set_num_threads(int(os.environ.get(machines.THREADS, "1")))
if machines.ROUNDING in os.environ:
    rounding.disturb()
# Ray's workers are nice by default, and starve where another process runs tests on every core.
os.environ.setdefault("RAY_worker_niceness", "0")
# A shell starts what runs in its background with SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads what another process has measured, or leaves anything."""
    monkeypatch.setenv("BLOCKROLL_CACHE", str(tmp_path))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local cluster; pools that find it running leave it running."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
