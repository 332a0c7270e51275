"""Which form of the kernels runs, and what is said where the one asked for cannot."""

import threading

import pytest
import torch

from blockroll.errors import InvalidInput, MissingDependency
from blockroll.kernels import choice

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _compiled(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(choice, "_device_name", lambda device: "a GPU")


def test_outside_of_any_choice_definitions_run():
    assert not choice.is_triton()
    with choice.using("triton"):
        assert choice.is_triton()
        with choice.using("reference"):
            assert not choice.is_triton()
        assert choice.is_triton()
    assert not choice.is_triton()


def test_a_choice_is_left_when_what_runs_inside_raises():
    with pytest.raises(ValueError, match="inside"), choice.using("triton"):
        raise ValueError("inside")
    assert not choice.is_triton()


def test_another_thread_has_a_choice_of_its_own():
    seen = []
    with choice.using("triton"):
        thread = threading.Thread(target=lambda: seen.append(choice.is_triton()))
        thread.start()
        thread.join()
    assert seen == [False]


def test_auto_is_triton_on_a_gpu_and_reference_on_a_cpu(monkeypatch):
    monkeypatch.setattr(choice, "_triton_version", lambda: "3.7.1")
    assert choice.choose("auto", GPU).form == "triton"
    assert str(choice.choose("auto", GPU)) == "triton (Triton 3.7.1, a GPU)"
    found = choice.choose("auto", CPU)
    assert found.form == "reference"
    assert "compiles for GPUs" in found.reason


@pytest.mark.parametrize(
    ("installed", "said"), [(None, "Triton is missing"), ("3.5.1", "Triton 3.5.1 is too old")]
)
def test_without_a_triton_that_serves_auto_says_why_and_triton_raises(monkeypatch, installed, said):
    monkeypatch.setattr(choice, "_triton_version", lambda: installed)
    found = choice.choose("auto", GPU)
    assert found.form == "reference"
    assert said in found.reason
    with pytest.raises(MissingDependency, match=said):
        choice.choose("triton", GPU)


def test_a_device_that_triton_does_not_know_is_named(monkeypatch):
    monkeypatch.setattr(choice, "_triton_version", lambda: "3.7.1")
    assert "the policy is on mps" in choice.choose("auto", torch.device("mps")).reason
    with pytest.raises(MissingDependency, match="the policy is on mps"):
        choice.choose("triton", torch.device("mps"))


def test_on_a_cpu_triton_is_refused_unless_it_is_interpreted(monkeypatch):
    with pytest.raises(InvalidInput, match="kernels is 'triton', and the policy is on cpu"):
        choice.choose("triton", CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(choice, "_triton_version", lambda: "3.7.1")
    assert str(choice.choose("triton", CPU)) == "triton (Triton 3.7.1, interpreted)"
    assert choice.choose("auto", CPU).form == "reference"


def test_definitions_run_where_they_are_asked_for():
    assert choice.choose("reference", GPU) == choice.Chosen("reference", "asked for")


def test_other_words_are_refused():
    with pytest.raises(InvalidInput, match="kernels is 'cuda'; allowed are 'auto', 'reference' and 'triton'"):
        choice.choose("cuda", CPU)
