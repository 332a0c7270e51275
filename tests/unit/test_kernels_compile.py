"""Every kernel that ships compiles for the GPUs it is meant for, and fits them; no GPU is needed."""

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles with Triton, which is missing or interprets", allow_module_level=True)

from tests import compiled
from tests.unit import too_large_kernel


@pytest.mark.parametrize("target", compiled.TARGETS)
def test_a_kernel_that_is_too_large_is_found(target):
    assert compiled.compiled("planted", too_large_kernel.build(32), target)["problems"] == []
    assert compiled.compiled("planted", too_large_kernel.build(256), target)["problems"]


@pytest.mark.parametrize("op", compiled.ops())
def test_an_op_compiles_and_fits(op):
    """One configuration for each GPU; the slow test has all."""
    (build, *_) = compiled.builds_of(op)
    for target in compiled.TARGETS:
        assert compiled.compiled(op, build, target)["problems"] == []


@pytest.mark.slow
@pytest.mark.parametrize("triton", compiled.TRITONS, ids=["installed", "oldest"])
@pytest.mark.parametrize("op", compiled.ops())
def test_all_that_ships_compiles_and_fits(op, triton):
    if triton is not None and not triton.is_dir():
        pytest.skip(f"the oldest Triton that serves is not in {triton.name}: `make test-slow` puts it there")
    rows = compiled.compile_all([op], tritons=[triton])
    assert {row["target"] for row in rows} == {*compiled.TARGETS}
    assert [row for row in rows if row["problems"]] == []
