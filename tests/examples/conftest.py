"""What the tests of the command line run on."""

import pytest

from tests.command_line import save_random_policy


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory):
    """The folder of a random policy that drafts four tokens by mask tokens."""
    return save_random_policy(tmp_path_factory.mktemp("policy"))
