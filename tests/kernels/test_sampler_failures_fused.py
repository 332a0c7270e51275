"""Bugs that other engines shipped: each is a check that the kernels pass and that a planted bug fails."""

import pytest

from blockroll.kernels.choice import using
from tests.kernels.planted import plant_in_sampler
from tests.kernels.sampler_failures import FAILURES

SLOW_CHECKS, QUICK_BUGS = {38, 44, 49}, {35, 40, 42, 53}


def numbers(slow):
    """Those of the page, of which some take long."""
    return pytest.mark.parametrize(
        "number",
        [
            pytest.param(number, marks=[pytest.mark.failure(number), *[pytest.mark.slow] * (number in slow)])
            for number in sorted(FAILURES)
        ],
    )


@pytest.fixture(autouse=True)
def _triton():
    with using("triton"):
        yield


@numbers(slow=SLOW_CHECKS)
def test_kernels_do_not_have_the_bug(number):
    FAILURES[number].check()


@numbers(slow={*FAILURES} - QUICK_BUGS)
def test_the_planted_bug_is_found(number, tmp_path, monkeypatch):
    check, *piece = FAILURES[number]
    plant_in_sampler(tmp_path, monkeypatch, *piece)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check()
