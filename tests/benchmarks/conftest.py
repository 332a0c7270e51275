"""What several experiments' tests need."""

import pytest

from benchmarks.workload import trained_adapter
from blockroll.policies.hf import HFPolicy


@pytest.fixture(scope="session")
def policy():
    return HFPolicy.from_pretrained("tiny")


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    """Of a conversion that is over at once."""
    return trained_adapter(tmp_path_factory.mktemp("evidence") / "adapter", max_tokens=300)
