"""A short form of the experiments with TRL."""

import json
import os
import signal

import pytest

from benchmarks import readme_trl
from benchmarks import trl as experiments
from benchmarks.trl_timing import train_in_turn
from benchmarks.workload import causal_part, trained_adapter

pytestmark = pytest.mark.filterwarnings(
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning",  # what TRL itself calls
)


@pytest.fixture(scope="module")
def drafting(tmp_path_factory):
    """A policy after a conversion of two rounds."""
    folder = tmp_path_factory.mktemp("trl") / "drafting"
    return experiments.drafting_policy(folder, max_tokens=600, prompts_per_round=16)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_stock_and_drafted_trainers_have_a_row_per_batch_and_seed(drafting, bf16):
    rows = experiments.stock(drafting, bf16=bf16, batches=(8,), seeds=(0,), steps=2)
    (row,) = rows
    assert row["generate_ratio"] > 0
    assert row["step_ratio"] > 0
    assert {name: len(rewards) for name, rewards in row["reward"].items()} == dict.fromkeys(
        experiments.SUBJECTS, 2
    )
    assert row["importance_ratio"] == pytest.approx([1, 1], abs=0.1 if bf16 else 1e-3)
    assert row["conversion"]["tokens"] >= 600
    json.dumps(rows)
    assert "| 8 |" in readme_trl.stock_table(rows, "float32")


def raises(callback):
    raise LookupError("planted")


def dies(callback):
    os.kill(os.getpid(), signal.SIGKILL)


def waits(callback):
    callback.on_step_end(None, None, None)


@pytest.mark.parametrize(("fault", "message"), [(raises, "LookupError: planted"), (dies, "process died")])
def test_a_trainer_that_fails_in_its_turn_is_named_and_ends_the_others(fault, message):
    with pytest.raises(RuntimeError, match=rf"(?s)second: .*{message}"):
        train_in_turn({"first": waits, "second": fault})


def test_alignment_has_a_row_per_seed_with_and_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    adapter = trained_adapter(tmp_path / "adapter", max_tokens=300)
    rows = experiments.alignment(adapter, seeds=(0,), steps=2, batch=8)
    assert [row["is_aligned"] for row in rows] == [False, True]
    for row in rows:
        assert len(row["reward"]) == len(row["kl"]) == len(row["rollout/acceptance_rate"]) == 2
        assert (row["draft/acceptance"][-1] is not None) == row["is_aligned"]
    json.dumps(rows)
    assert "aligned" in readme_trl.alignment_table(rows)


def test_smollm2s_experiment_runs_on_any_chat_model_with_an_adapter(tmp_path, monkeypatch):
    policy = causal_part(trained_adapter(tmp_path / "adapter", max_tokens=300))
    assert policy.tokenizer is not None
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}\n"
    monkeypatch.setattr(experiments, "SMOLLM2", tmp_path)
    policy.save_pretrained(tmp_path / "policy")
    rows = experiments.smollm2(steps=1, batch=8, plans=("plain", "two_forward(4)"))
    assert [row["plan"] for row in rows] == ["plain", "two_forward(4)"]
    json.dumps(rows)


@pytest.mark.parametrize(
    ("reply", "reward"), [("7", 1.0), ("3 + 4 = 7.", 1.0), ("It is 7, not 8", 0.0), ("seven", 0.0), ("", 0.0)]
)
def test_a_sum_is_right_if_its_last_number_is(reply, reward):
    assert experiments.is_right_sum([[{"role": "assistant", "content": reply}]], [7]) == [reward]
