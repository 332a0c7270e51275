"""Tests of Triton's kernels, interpreted: in a process of its own, as Triton decides when it is loaded."""

import os
from unittest import mock

import pytest


def pytest_ignore_collect(collection_path):
    """Nothing here runs beside tests that compile, or where Triton does not interpret."""
    return True if os.environ.get("TRITON_INTERPRET") != "1" else None


@pytest.fixture(autouse=True, scope="session")
def _triton():
    pytest.importorskip("triton")


@pytest.fixture(autouse=True, scope="session")
def _patched_once():
    """What kernels call finds Triton's language patched already.

    The interpreter patches it once more at every call, on top of what is there: the longer a kernel runs, the
    longer each of its operations takes. Only the module that Triton's own functions see is left to patch.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    core = pytest.importorskip("triton.language").core
    patched = set()

    def call(function, *args, **kwargs):
        seen = {id(each) for each in function.fn.__globals__.values() if each is core}
        if not seen <= patched:
            interpreter._patch_lang(function.fn)
            patched.update(seen)
        return function.rewrite()(*args, **kwargs)

    with mock.patch.object(interpreter.InterpretedFunction, "__call__", call):
        yield
