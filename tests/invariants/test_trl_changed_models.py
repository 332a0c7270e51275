"""A model that a script changes between two trainings: it is generated with as it is, or an error at once."""

from dataclasses import replace

import peft
import pytest
import torch
from peft import OSFConfig

from blockroll.config import RolloutConfig
from blockroll.errors import InvalidInput, WeightSyncError
from blockroll.policies.loading import load_tokenizer
from blockroll.rl_loops.trl import weights
from blockroll.rollout.pool.pool import RolloutPool
from blockroll.types import Sampling
from tests.invariants.test_trl_peft import gap, lora, small_model, small_trainer
from tests.params import slow_beyond
from tests.trl_trainers import BEST_OF_EVERY_STEP, ROWS

pytestmark = pytest.mark.filterwarnings(
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning",  # what TRL itself calls
)
FIRST = RolloutConfig(plan="plain")  # laws are compared where a run begins


def trained(folder, *, rollout=FIRST, **arguments):
    made = small_trainer(folder, small_model(), rollout=rollout, **arguments)
    made.train()
    return made


def greedy(made, num_tokens=8):
    """The most likely tokens behind a prompt: by the pool that generates, and by the model itself."""
    made.rollouts.sync_weights()
    pool = made.rollouts.placement.pool
    sampling = Sampling(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    (rollout,) = pool.generate(pool.requests([[5, 9, 4, 11]], sampling=sampling))
    made.model.eval()
    ids = made.model.generate(
        torch.tensor([[5, 9, 4, 11]]), do_sample=False, max_new_tokens=num_tokens, eos_token_id=None
    )
    return list(rollout.token_ids), ids[0, 4:].tolist()


def assert_generates_as_it_is(made):
    assert gap(made) < 1e-4
    mine, its_own = greedy(made)
    assert mine == its_own


def second_adapter(made):
    made.model.add_adapter("other", lora(target_modules=["v_proj"], init_lora_weights=False))
    made.model.set_adapter("other")


def adapter_deleted(made):
    second_adapter(made)
    made.model.delete_adapter("default")


def scaled(made):
    for layer in made.model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.set_scale("default", 3.0)


def merged_for_good(made):
    made.model = made.model_wrapped = made.model.merge_and_unload().requires_grad_(True)


@pytest.mark.parametrize("change", slow_beyond(2, [second_adapter, scaled, adapter_deleted, merged_for_good]))
def test_adapters_that_are_exchanged_between_trainings_are_generated_with(tmp_path, change):
    made = trained(tmp_path, peft_config=lora())
    version = made.rollouts.version
    change(made)
    assert_generates_as_it_is(made)
    assert made.rollouts.version > version
    made.train()
    assert_generates_as_it_is(made)


def test_a_model_without_its_adapter_is_generated_with_while_it_is_switched_off(tmp_path):
    made = trained(tmp_path, peft_config=lora(init_lora_weights=False))
    with_it = greedy(made)
    with made.model.disable_adapter():
        assert gap(made) < 1e-4
        without_it = greedy(made)
    assert with_it[0] == with_it[1] != without_it[0] == without_it[1]
    assert greedy(made) == with_it


def test_a_kind_that_cannot_unmerge_goes_on_training_its_update(tmp_path):
    config = OSFConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], effective_rank=8)
    made = trained(tmp_path, peft_config=config)
    layer = made.model.get_base_model().model.layers[0].self_attn.q_proj
    assert not layer.merged
    assert_generates_as_it_is(made)


@pytest.mark.parametrize(
    "put", [peft.get_peft_model, lambda *args: peft.inject_adapter_in_model(*args[::-1])]
)
def test_layers_that_are_put_in_after_the_trainer_was_made_are_refused_by_name(tmp_path, put):
    made = trained(tmp_path)
    made.model = made.model_wrapped = put(made.model, lora(init_lora_weights=False))
    with pytest.raises(InvalidInput, match=r"PEFT's layers were put around model\.layers\.0.*q_proj"):
        made.train()


def test_generating_without_such_layers_is_caught(tmp_path, monkeypatch):
    """Planted: a policy that shares weights takes those below the layers."""
    find = weights.find_places

    def without_tuners(bare, model):
        return [replace(place, tuners=()) for place in find(bare, model)]

    made = trained(tmp_path)
    monkeypatch.setattr(weights, "find_places", without_tuners)
    peft.inject_adapter_in_model(lora(init_lora_weights=False), made.model)
    with pytest.raises(WeightSyncError, match="not the one that is trained"):
        made.train()


@pytest.mark.parametrize("config", [None, lora()], ids=["shared", "copied"])
def test_a_vocabulary_that_is_resized_after_the_trainer_was_made_is_refused_by_name(tmp_path, config):
    made = trained(tmp_path, **({} if config is None else {"peft_config": config}))
    model = made.model if config is None else made.model.get_base_model()
    model.resize_token_embeddings(300, mean_resizing=False)
    with pytest.raises(InvalidInput, match=r"has shape \(300, 32\), \(260, 32\) is generated with"):
        made.train()


def other_forward(made):
    made.model.model.norm.register_forward_hook(lambda module, args, output: output * 1.5)


def other_setting(made):
    made.model.model.norm.variance_epsilon = 1.0


@pytest.mark.parametrize("change", [other_forward, other_setting])
@pytest.mark.parametrize("run", slow_beyond(1, ["train", "evaluate"]))
def test_another_forward_is_an_error_where_the_next_run_begins(tmp_path, change, run):
    made = trained(tmp_path, eval_dataset=ROWS.select(range(4)), options={"per_device_eval_batch_size": 4})
    change(made)
    with pytest.raises(WeightSyncError, match="not the one that is trained"):
        getattr(made, run)()


def test_the_best_adapter_is_generated_with_after_it_was_loaded(tmp_path):
    made = trained(
        tmp_path,
        peft_config=lora(),
        eval_dataset=ROWS.select(range(4)),
        options={
            **BEST_OF_EVERY_STEP,
            "metric_for_best_model": "eval_loss",
            "per_device_eval_batch_size": 4,
        },
    )
    made.evaluate()
    row = made.state.log_history[-1]
    assert row["eval_rollout_corr/rollout_is_max"] == pytest.approx(1, abs=1e-3)
    assert_generates_as_it_is(made)


@pytest.mark.slow
def test_two_trainers_with_adapters_take_turns_on_one_pool(tmp_path):
    small_model().save_pretrained(tmp_path / "policy")
    load_tokenizer("tiny").save_pretrained(tmp_path / "policy")
    with RolloutPool.from_pretrained(str(tmp_path / "policy"), plan="plain") as pool:
        first, second = (
            trained(tmp_path / name, rollout=pool, peft_config=lora(target_modules=[name]))
            for name in ("q_proj", "v_proj")
        )
        for made in (first, second, first):
            made.train()
            row = made.state.log_history[-2]
            assert row["rollout_corr/rollout_is_max"] == pytest.approx(1, abs=1e-3)
            mine, its_own = greedy(made)
            assert mine == its_own
