"""The policy that training runs of unit tests start from."""

import pytest

from tests.runs import save_policy


@pytest.fixture(scope="session")
def policy_path(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"), seed=0)
