"""Memory told beforehand: what is said of a checkpoint is what an engine then allocates, byte for byte."""

import logging

import pytest
import torch

from blockroll.config import RolloutConfig
from blockroll.errors import InvalidInput
from blockroll.policies.footprint import Footprint, bare_policy, stored_bytes
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.pool import memory
from blockroll.rollout.pool.makers import replica_around
from blockroll.rollout.pool.memory import CachePlan, DeviceMemory, num_sharing, plan_of
from blockroll.types import Sampling
from tests.engines import make_requests
from tests.models import FAMILIES, adapted_policy, random_model

CPU = torch.device("cpu")
GB = 10**9


def saved(folder, family="llama", dtype=torch.float32):
    model = random_model(family).to(dtype)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "float32"), *((family, "bfloat16") for family in FAMILIES)]
)
def test_what_is_said_before_loading_is_what_is_loaded(tmp_path, family, dtype):
    folder = saved(tmp_path / "policy", family)
    bare = bare_policy(folder, dtype=dtype)
    assert {each.device.type for each in bare.model.parameters()} == {"meta"}
    loaded = HFPolicy.from_pretrained(folder, device="cpu", dtype=dtype, with_tokenizer=False)
    said = Footprint.of(bare, CPU)
    tensors = {each.data_ptr(): each for each in (*loaded.model.parameters(), *loaded.model.buffers())}
    assert said.weights == sum(each.numel() * each.itemsize for each in tensors.values())
    assert said == Footprint.of(loaded, CPU)
    assert plan_of(bare, RolloutConfig(plan="fused(4)")) == plan_of(loaded, RolloutConfig(plan="fused(4)"))


def test_copies_of_weights_are_counted_as_they_are_made(tmp_path):
    policy = adapted_policy()
    policy.model.save_pretrained(tmp_path)
    policy.adapter.save_pretrained(tmp_path)
    loaded = HFPolicy.from_pretrained(
        tmp_path, device="cpu", with_tokenizer=False, prepack="on", compile="off"
    )
    with torch.inference_mode(), loaded.packed.serving():
        pass  # they are made at the first forward
    said = Footprint.of(bare_policy(tmp_path, prepack="on", compile="off"), CPU)
    assert said.packed == loaded.packed.num_bytes > 0
    assert said.adapter == sum(each.numel() * each.itemsize for each in loaded.adapter.state_dict().values())
    for option in ("prepack", "compile"):
        without = Footprint.of(bare_policy(tmp_path, **{option: "off"}), CPU)
        assert without.loaded < Footprint.of(bare_policy(tmp_path), CPU).loaded
    on_a_device = Footprint.of(bare_policy(tmp_path), torch.device("cuda"))
    assert (on_a_device.packed, on_a_device.adapter) == (0, said.adapter)


def test_bytes_in_a_folder_are_read_from_its_headers_alone(tmp_path):
    folder = saved(tmp_path / "policy", dtype=torch.bfloat16)
    model = random_model()
    numbers = sum(each.numel() for each in model.parameters())
    assert stored_bytes(folder) == {"BF16": 2 * numbers}
    (file,) = folder.glob("*.safetensors")
    with file.open("r+b") as opened:
        opened.truncate(8 + int.from_bytes(file.read_bytes()[:8], "little"))  # the header, and no weights
    assert stored_bytes(folder) == {"BF16": 2 * numbers}
    file.write_bytes(b"\xff" * 40)
    with pytest.raises(RuntimeError, match="cannot be read: its header would have"):
        stored_bytes(folder)


@pytest.mark.parametrize(("plan", "rows"), [("plain", 0), ("plain", 150), ("fused(4)", 150), ("auto", 150)])
def test_a_cache_takes_the_bytes_that_were_said(tmp_path, plan, rows):
    """Of requests of one length as many as fit, where the share bounds them and where it does not."""
    folder = saved(tmp_path / "policy")
    config = RolloutConfig(plan=plan, max_batch_size=8, history_tokens=64)
    bare, here = bare_policy(folder), DeviceMemory.of(CPU)
    if rows:
        share = (rows + 0.5) * bare.kv_shape.num_bytes / here.total
        config = RolloutConfig(plan=plan, max_batch_size=8, history_tokens=64, memory_fraction=share)
    said = CachePlan.of(bare, config, plan_of(bare, config), here, device=CPU)
    assert said.budget.rows == rows or not rows
    loaded = HFPolicy.from_pretrained(folder, device="cpu", with_tokenizer=False)
    replica = replica_around(loaded, config)
    assert replica.limits.max_text == said.room.max_text
    requests = make_requests([(5,) * 20] * 8, Sampling(max_tokens=9, ignore_eos=True))
    replica.submit(requests)
    replica.engine.step()
    num_rows = said.room.rows_of(29)
    assert replica.engine._cache.num_bytes == said.room.num_slots(num_rows) * num_rows * said.budget.row
    num_running = len(replica.engine._scheduler.running)
    assert num_running == said.room.num_slots(num_rows) == (rows // num_rows or 8)


def test_a_cache_in_pages_takes_the_bytes_that_were_said():
    """All pages and the one that no text has; as many run as was said of texts that begin differently."""
    policy = HFPolicy(random_model())
    config = RolloutConfig(plan="plain", max_batch_size=8, max_cache_rows=150, cache="pages", page_size=8)
    said = CachePlan.of(policy, config, plan_of(policy, config), DeviceMemory.of(CPU))
    assert said.num_bytes == (150 // 8 + 1) * 8 * policy.kv_shape.num_bytes
    replica = replica_around(policy, config)
    sampling = Sampling(max_tokens=9, ignore_eos=True)
    replica.submit(make_requests([(5 + index,) * 20 for index in range(8)], sampling))
    most = 0
    while replica.engine.num_requests:
        replica.engine.step()
        lengths = [
            replica.engine._served.requests[each].num_tokens for each in replica.engine._scheduler.running
        ]
        if lengths and min(lengths) >= 28:
            most = max(most, len(lengths))
    assert replica.engine._cache.num_bytes == said.num_bytes
    assert 0 < most <= said.room.num_texts(29) == 4


def test_rows_that_are_given_win_over_the_share():
    config = RolloutConfig(plan="plain", memory_fraction=1.0, max_cache_rows=96)
    replica = replica_around(HFPolicy(random_model()), config)
    assert replica.limits.max_text == 95
    requests = make_requests([(5,) * 20] * 8, Sampling(max_tokens=70, ignore_eos=True))
    replica.submit(requests)
    replica.engine.step()
    assert len(replica.engine._scheduler.running) == 1


def test_less_free_memory_than_its_share_bounds_the_cache_and_is_said(monkeypatch, caplog):
    policy = HFPolicy(random_model())
    row = policy.kv_shape.num_bytes

    def have(free):
        monkeypatch.setattr(DeviceMemory, "of", lambda device: DeviceMemory(total=100 * GB, free=free))

    config = RolloutConfig(plan="plain", max_batch_size=8)
    have(99 * GB)
    with caplog.at_level(logging.WARNING):
        assert replica_around(policy, config).limits.max_text == 96
        assert not caplog.messages
        have(Footprint.of(policy, CPU).packed + 2 * 64 * row)
        assert replica_around(policy, config).limits.max_text == 63
        (said,) = caplog.messages
        assert "keys and values may take 16.4 kB, 64 tokens: memory_fraction 0.3 of 100 GB" in said
        have(16 * row)
        with pytest.raises(InvalidInput, match="keys and values of a text of one token take"):
            replica_around(policy, config)


@pytest.mark.parametrize(
    ("options", "device", "engines"),
    [
        ({"backend": "local", "num_replicas": 3}, "cuda", 3),
        ({"backend": "ray", "num_replicas": 3}, "cpu", 3),
        ({"backend": "ray", "num_replicas": 3}, "cuda", 1),
        ({"backend": "ray", "num_replicas": 3, "gpus_per_replica": 0.4}, "cuda", 2),
        ({"backend": "ray", "num_replicas": 3, "gpus_per_replica": 2}, "cuda", 1),
    ],
)
def test_replicas_that_share_a_device_are_counted(options, device, engines):
    assert num_sharing(RolloutConfig(**options), torch.device(device)) == engines


def group(folder, **files):
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("_dot_", ".")).write_text(text)


def test_limits_of_control_groups_bound_what_a_machine_has(tmp_path, monkeypatch):
    """Of the second version and of the first, of this group and of those around it."""
    whole = DeviceMemory.of(CPU)
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "two")
    monkeypatch.setattr(memory, "_groups", lambda: ["0::/job/step"])
    assert DeviceMemory.of(CPU).total == whole.total  # nothing says a limit
    stat = {"memory_dot_current": "3000000", "memory_dot_stat": "anon 5\ninactive_file 1000000\n"}
    group(tmp_path / "two" / "job" / "step", memory_dot_max="max\n", **stat)
    assert DeviceMemory.of(CPU).total == whole.total
    group(tmp_path / "two" / "other", memory_dot_max="1\n", **stat)
    (tmp_path / "two" / "job" / "memory.max").write_text("9000000\n")
    for name in ("memory.current", "memory.stat"):
        (tmp_path / "two" / "job" / name).write_text((tmp_path / "two" / "job" / "step" / name).read_text())
    assert DeviceMemory.of(CPU) == DeviceMemory(total=9_000_000, free=7_000_000)

    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "one")
    monkeypatch.setattr(memory, "_groups", lambda: ["5:cpu,cpuacct:/job", "4:memory:/job", "0::/"])
    group(
        tmp_path / "one" / "memory" / "job",
        memory_dot_limit_in_bytes="4000000",
        memory_dot_usage_in_bytes="3500000",
        memory_dot_stat="total_inactive_file 0\n",
    )
    assert DeviceMemory.of(CPU) == DeviceMemory(total=4_000_000, free=500_000)
