"""Tests of Triton's kernels, interpreted: in a process of its own, as Triton decides when it is loaded."""

import os

import pytest


def pytest_ignore_collect(collection_path):
    """Nothing here runs beside tests that compile, or where Triton does not interpret."""
    return True if os.environ.get("TRITON_INTERPRET") != "1" else None


@pytest.fixture(autouse=True, scope="session")
def _triton():
    pytest.importorskip("triton")
