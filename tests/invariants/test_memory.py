"""Memory told beforehand: what is said of a checkpoint is what an engine then allocates, byte for byte."""

import logging

import pytest
import torch

from blockroll.config import RolloutConfig
from blockroll.errors import InvalidInput
from blockroll.policies.base import StatePart
from blockroll.policies.footprint import Footprint, bare_policy, stored_bytes
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.engine import repeated
from blockroll.rollout.engine.cache.state import StateMemory
from blockroll.rollout.pool import memory
from blockroll.rollout.pool.makers import replica_around
from blockroll.rollout.pool.memory import CachePlan, DeviceMemory, num_sharing, plan_of
from blockroll.types import HISTORY, Plan, Sampling
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


class PolicyWithStates(HFPolicy):
    """Its layers leave states of zeros behind their rows; no row reads them."""

    state_shape = (
        StatePart(name="sum", num_layers=2, shape=(6,), dtype=torch.float32),
        StatePart(name="rows", num_layers=1, shape=(2, 3), dtype=torch.float64),
    )

    def prefill(self, ids_BR, window, **options):
        self._leave(ids_BR, window)
        super().prefill(ids_BR, window, **options)

    def verify_logits(self, ids_BR, window):
        self._leave(ids_BR, window)
        return super().verify_logits(ids_BR, window)

    def draft_logits(self, ids_BC, num_drafts, window):
        self._leave(ids_BC, window)
        return super().draft_logits(ids_BC, num_drafts, window)

    def _leave(self, ids_BR, window):
        rows_BC = ids_BR if window.states.rows_BC is None else window.states.rows_BC
        for part in self.state_shape:
            for layer in range(part.num_layers):
                states_BC = torch.zeros((*rows_BC.shape, *part.shape), dtype=part.dtype)
                window.states.leave(part.name, layer, states_BC)


def run_all(engine, requests):
    engine.submit(requests)
    while engine.num_requests:
        engine.step()


@pytest.fixture
def states_said_and_taken(monkeypatch):
    """What is said of the states of a cache, and what they take once all slots and snapshots are in use."""

    def both(layout, plan):
        policy = PolicyWithStates(random_model(trained_drafts=8))
        here = DeviceMemory(total=1000 * policy.kv_shape.num_bytes, free=10**9)
        monkeypatch.setattr(DeviceMemory, "of", lambda device: here)
        options = {"cache": layout, "page_size": 8, "max_length": 67, "memory_fraction": 0.5}
        config = RolloutConfig(plan=plan, max_batch_size=4, history_tokens=64, **options)
        said = CachePlan.of(policy, config, plan_of(policy, config), here)
        whole = said.num_bytes + said.budget.beside + said.budget.rows // said.states.step * said.states.state
        assert whole <= said.budget.asked + 8 * said.budget.row  # the page that no text has is beside it
        engine = replica_around(policy, config).engine
        for seed in range(8):  # as many different texts as fill all snapshots
            for num_tokens in (66, 40):
                prompts = [
                    tuple(5 + (place * (seed * 4 + slot + 1)) % 17 for place in range(num_tokens))
                    for slot in range(4)
                ]
                sampling = Sampling(max_tokens=67 - num_tokens, ignore_eos=True)
                run_all(engine, make_requests(prompts, sampling, seed=seed))
        return said.budget.beside + said.snapshots, engine._cache._states.num_bytes

    return both


@pytest.mark.parametrize("layout", ["slots", "pages"])
@pytest.mark.parametrize("plan", ["plain", "two_forward(8)"])
def test_states_take_the_bytes_that_were_said(states_said_and_taken, layout, plan):
    said, taken = states_said_and_taken(layout, plan)
    assert said == taken > 0


def test_candidates_that_are_not_counted_are_noticed(states_said_and_taken, monkeypatch):
    count = StateMemory.slot
    monkeypatch.setattr(StateMemory, "slot", lambda self, **_: count(self, num_drafts=0, max_rows=0))
    said, taken = states_said_and_taken("slots", "plain")
    assert said < taken


def buffers_said_and_taken(plan, page_size):
    """Shapes and bytes that are said of forwards in buffers, and those that a run of all sizes had."""
    policy = HFPolicy(random_model())
    options = {"cache": "pages", "graphs": "buckets", "page_size": page_size, "max_length": 40}
    config = RolloutConfig(plan=plan.name, max_batch_size=5, history_tokens=64, **options)
    said = CachePlan.of(policy, config, plan, DeviceMemory.of(CPU))
    shapes = repeated.shapes_of([plan], max_size=5, max_length=40, page_size=page_size)
    assert said.num_shapes == len(shapes)
    assert said.graphs == sum(shape.num_bytes for shape in shapes)
    engine = replica_around(policy, config).engine
    for number in (5, 5, 4, 3, 2, 1):  # pages come with the first, and with other memory other shapes
        prompts = [(5 + slot, 9) for slot in range(number)]
        run_all(engine, make_requests(prompts, Sampling(max_tokens=38, ignore_eos=True), seed=number))
    forwards = engine._forwards
    assert forwards.num_bytes == sum(shape.num_bytes for shape in forwards._runs)
    return said, shapes, forwards


@pytest.mark.parametrize("page_size", [4, 16, 32])
@pytest.mark.parametrize("plan", [Plan(0), Plan(4)], ids=lambda plan: plan.name)
def test_buffers_of_shapes_take_the_bytes_that_were_said(plan, page_size):
    said, shapes, forwards = buffers_said_and_taken(plan, page_size)
    assert forwards._runs.keys() == shapes
    assert forwards.num_bytes == said.graphs > 0


@pytest.mark.parametrize("plan", [Plan(4, (0, 2, 4)), Plan(4, drafter=HISTORY)], ids=lambda plan: plan.name)
def test_no_shape_is_met_that_was_not_said(plan):
    """What is said is of every width and of requests that begin late, which a run may lack."""
    said, shapes, forwards = buffers_said_and_taken(plan, 8)
    assert forwards._runs.keys() <= shapes
    for kind in {shape.kind for shape in forwards._runs}:
        met, told = (
            {each.num_pages for each in some if each.kind == kind} for some in (forwards._runs, shapes)
        )
        assert met == told
    assert 0 < forwards.num_bytes <= said.graphs


def test_a_width_that_is_not_counted_is_noticed(monkeypatch):
    monkeypatch.setattr(repeated, "ROW_STEP", 64)  # tables in pages of that many rows, where they have 16
    said, shapes, forwards = buffers_said_and_taken(Plan(0), 4)
    assert not forwards._runs.keys() <= shapes
    assert forwards.num_bytes != said.graphs


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
