"""What doctor says of a checkpoint's memory, before anything of it is loaded."""

import io
import shutil

import pytest
import torch
from rich.console import Console

from blockroll.cli.memory import config_of, show_memory
from blockroll.policies.base import StatePart
from blockroll.policies.hf import HFPolicy
from blockroll.policies.loading import TINY_POLICY_DIR
from blockroll.rollout.engine.budget import size
from blockroll.rollout.pool.memory import DeviceMemory
from tests.command_line import blockroll

pytestmark = pytest.mark.skipif(
    not (TINY_POLICY_DIR / "tokenizer.json").is_file(), reason="needs the shipped policy's tokenizer"
)


def test_doctor_says_what_a_checkpoint_takes_before_it_is_loaded(policy_path, tmp_path):
    """The folder holds no weights: memory is told before the error that they are missing."""
    folder = tmp_path / "policy"
    shutil.copytree(policy_path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    options = (
        "policy.dtype=bfloat16",
        "policy.prepack=off",
        "rollout.max_batch_size=3",
        "rollout.plan=plain",
    )

    result = blockroll("doctor", "--model", folder, *options, "rollout.max_cache_rows=300")

    assert result.exit_code == 2, result.output
    assert "the weights of the checkpoint" in result.stderr
    policy = HFPolicy.from_pretrained(policy_path, device="cpu", dtype="bfloat16", with_tokenizer=False)
    weights = sum(
        each.numel() * each.itemsize for each in (*policy.model.parameters(), *policy.model.buffers())
    )
    row, longest = policy.kv_shape.num_bytes, policy.max_length
    num_rows = -(-(longest + 1) // 16) * 16
    together = min(300 // num_rows, 3)
    assert 0 < together < 3
    for words in (
        f"weights {size(weights)}",
        f"keys and values of a token {size(row)}",
        f"keys and values in all: 300 tokens {size(300 * row)}",
        f"of them, requests of {longest:,} tokens at once: {together} {size(together * num_rows * row)}",
        "rollout.max_cache_rows bounds keys and values",
    ):
        assert words in " ".join(result.stdout.split())
    in_pages = (*options, "rollout.max_cache_rows=300", "rollout.cache=pages", "rollout.page_size=32")
    shown = " ".join(blockroll("doctor", "--model", folder, *in_pages).stdout.split())
    for words in (
        f"of a page of 32 tokens {size(32 * row)}",
        f"keys and values in all: 288 tokens in 9 pages {size((9 + 1) * 32 * row)}",
    ):
        assert words in shown
    assert "shapes" not in shown  # nothing runs in buffers on a CPU, unless it is asked to
    length = "rollout.max_length=40"
    shown = " ".join(
        blockroll("doctor", "--model", folder, *in_pages, length, "rollout.graphs=buckets").stdout.split()
    )
    # Of 1, 2 or 3 requests: a token of each, tables of 1 or 2 pages, and lengths, in 8 bytes each.
    assert f"buffers of forwards in 6 shapes up to {size(8 * 6 * ((1 + 1 + 1) + (1 + 2 + 1)))}" in shown


def test_doctor_says_what_states_of_layers_take(policy_path, monkeypatch):
    """As if layers of a family carried one."""
    part = StatePart(name="sum", num_layers=3, shape=(4,), dtype=torch.float32)
    monkeypatch.setattr(HFPolicy, "state_shape", (part,))
    options = ("max_batch_size=3", "plan=plain", "max_length=67", "max_cache_rows=240")
    config, written = config_of([f"rollout.{each}" for each in options]), io.StringIO()
    show_memory(policy_path, None, "cpu", config, Console(file=written, width=200))
    shown = " ".join(written.getvalue().split())
    # A state, 5 candidates at the marks of 65 rows and 2 snapshots; and one snapshot for each 16 rows.
    assert f"states of all slots, with their candidates up to {size(3 * (1 + 5 + 2) * 48)}" in shown
    assert f"states kept along keys and values up to {size(240 // 16 * 48)}" in shown


def test_doctor_says_what_does_not_fit_and_what_there_is(policy_path, monkeypatch):
    monkeypatch.setattr(DeviceMemory, "of", lambda device: DeviceMemory(total=64_000_000, free=20_000))
    result = blockroll("doctor", "--model", policy_path, "--device", "cpu", "rollout.num_replicas=2")
    assert result.exit_code == 2
    for words in (
        "2 replicas take",
        "of weights in float32",
        "20 kB of 64 MB are free on cpu",
        "policy.dtype=bfloat16",
    ):
        assert words in result.stderr


def test_doctor_loads_nothing_in_float32_where_only_half_of_it_fits(policy_path, monkeypatch):
    policy = HFPolicy.from_pretrained(policy_path, device="cpu", with_tokenizer=False)
    weights = sum(each.numel() * each.itemsize for each in policy.model.parameters())
    free = weights - 1000
    monkeypatch.setattr(DeviceMemory, "of", lambda device: DeviceMemory(total=64_000_000, free=free))
    options = ("policy.dtype=bfloat16", "policy.prepack=off", "policy.compile=off")
    result = blockroll("doctor", "--model", policy_path, "--device", "cpu", *options)
    assert result.exit_code == 2, result.output
    assert "a checkpoint is checked in float32, in which its weights take" in result.stderr
    assert f"{size(free)} are free on cpu" in result.stderr
    assert "keys and values in all" in result.stdout
