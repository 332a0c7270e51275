"""The policies that unit tests start from."""

import pytest

from tests.models import random_policy
from tests.runs import save_policy


@pytest.fixture(scope="session")
def policy_path(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"), seed=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A policy with random weights, and its folder."""
    policy = random_policy()
    folder = tmp_path_factory.mktemp("policy")
    policy.save_pretrained(folder)
    return policy, str(folder)
