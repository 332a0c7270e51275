"""PEFT under a TRL trainer: the generating model is the trained one."""

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from transformers import AutoConfig, AutoModelForCausalLM

from blockroll.config import RolloutConfig
from blockroll.errors import InvalidInput, WeightSyncError
from blockroll.policies.loading import load_tokenizer
from blockroll.rl_loops.trl import placement
from blockroll.rl_loops.trl.weights import full_weights
from blockroll.rollout.engine.cache.slots import SlotCache
from blockroll.rollout.pool.pool import RolloutPool
from tests.models import FAMILIES, SHAPE
from tests.params import slow_beyond
from tests.trl_trainers import even_share, logs, trainer

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:Unsupported layer type:UserWarning",  # PEFT, of the norms that it is asked to train
        "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning",  # what TRL itself calls
    ),
    pytest.mark.filterwarnings(
        "ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"  # PEFT's own
    ),
]


def test_a_lora_policy_is_decoded_merged_and_its_base_does_not_change(tmp_path):
    made = trainer(
        tmp_path,
        options={"learning_rate": 1e-2, "max_steps": 3},
        peft_config=LoraConfig(
            r=4, target_modules=["q_proj", "v_proj", "down_proj"], modules_to_save=["norm"]
        ),
    )
    base = {
        name: parameter.detach().clone()
        for name, parameter in made.model.named_parameters()
        if "base_layer" in name
    }
    rows = logs(made)
    assert max(row["rollout_corr/rollout_is_max"] for row in rows) == pytest.approx(1, abs=1e-3)
    assert all(
        torch.equal(dict(made.model.named_parameters())[name], before) for name, before in base.items()
    )
    moved = dict(made.rollouts.placement.policy.model.named_parameters())[
        "model.layers.0.self_attn.q_proj.weight"
    ]
    stock = next(value for name, value in base.items() if "layers.0.self_attn.q_proj" in name)
    assert not torch.equal(moved, stock)


def small_model(family="llama", *, tied=False):
    """Two layers at random over the shipped policy's vocabulary."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("tiny")
    shape = {**SHAPE, **FAMILIES[family], "vocab_size": len(tokenizer), "tie_word_embeddings": tied}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**shape, **ends}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)  # a fresh model's attention is flat: nothing that it reads would matter
    return model


def small_trainer(folder, model, *, options=None, **arguments):
    return trainer(
        folder,
        model=model,
        processing_class=load_tokenizer("tiny"),
        reward_funcs=even_share,
        rollout=arguments.pop("rollout", RolloutConfig(plan="plain", check_sync="every")),
        options={
            "learning_rate": 5e-2,
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "max_completion_length": 6,
            "gradient_checkpointing": False,
            **(options or {}),
        },
        **arguments,
    )


def gap(made):
    """The largest difference between the logits that are trained and those that generate."""
    made.rollouts.sync_weights()
    made.model.eval()
    policy = made.rollouts.placement.policy
    ids = torch.arange(20).reshape(2, 10)
    cache = SlotCache(policy, num_slots=2, capacity=16)
    with torch.no_grad():
        trained = made.model(input_ids=ids).logits
    return float((policy.verify_logits(ids, cache.window(0, 2, 10)) - trained).abs().max())


def lora(**options):
    return LoraConfig(r=4, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **options})


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SETUPS = {
    "every linear layer": (lora(target_modules="all-linear"), "llama", True),
    "embeddings": (lora(target_modules=["q_proj", "embed_tokens"]), "llama", False),
    "tied embeddings": (lora(target_modules=["q_proj", "embed_tokens"]), "llama", True),
    "copied embeddings": (lora(modules_to_save=["embed_tokens"]), "llama", False),
    "tied and copied embeddings": (lora(modules_to_save=["embed_tokens"]), "llama", True),
    "copied head": (lora(modules_to_save=["lm_head"]), "llama", False),
    "tied and copied head": (lora(modules_to_save=["lm_head"]), "llama", True),
    "kept tied": (lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), "llama", True),
    "rows": (lora(trainable_token_indices=[5, 6]), "llama", False),
    "dora": (lora(use_dora=True, target_modules=["q_proj", "down_proj"]), "qwen3", True),
    "biases": (lora(bias="all", target_modules=["q_proj", "o_proj"], lora_bias=False), "qwen2", True),
    "experts": (lora(target_parameters=EXPERTS), "qwen3_moe", False),
    "experts beside copies": (lora(target_parameters=EXPERTS, modules_to_save=["norm"]), "qwen3_moe", True),
    "ia3": (
        IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        "llama",
        True,
    ),
    "loha": (LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"]), "llama", False),
    "norms": (
        LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm", "input_layernorm"]),
        "llama",
        True,
    ),
    "oft": (OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], oft_block_size=8), "llama", False),
}


@pytest.mark.parametrize("name", slow_beyond(7, SETUPS))
def test_the_generating_model_equals_the_trained_one(tmp_path, name):
    config, family, tied = SETUPS[name]
    made = small_trainer(tmp_path, small_model(family, tied=tied), peft_config=config)
    before = {key: value.detach().clone() for key, value in made.model.named_parameters()}
    made.train()
    assert gap(made) < 1e-4
    moved = {key for key, value in made.model.named_parameters() if not torch.equal(value, before[key])}
    trained = {key for key, value in made.model.named_parameters() if value.requires_grad}
    assert moved
    assert moved <= trained  # merging has left no trace in the base


def test_a_second_adapter_for_the_reference_is_not_generated_with(tmp_path):
    given = get_peft_model(small_model(), lora(modules_to_save=["lm_head"]))
    made = small_trainer(tmp_path, given, options={"beta": 0.1})
    made.train()
    assert "ref" in made.model.peft_config
    assert gap(made) < 1e-4


def test_what_is_active_merged_or_switched_off_generates_as_it_trains(tmp_path):
    given = get_peft_model(small_model(tied=True), lora(modules_to_save=["norm"]))
    given.add_adapter("other", lora(target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in given.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.1)
    made = small_trainer(tmp_path, given)
    versions = []
    for change in (
        lambda: None,
        lambda: given.set_adapter("other"),
        lambda: given.base_model.disable_adapter_layers(),
        lambda: given.base_model.enable_adapter_layers(),
        lambda: given.merge_adapter(),
        lambda: given.unmerge_adapter(),
    ):
        change()
        assert gap(made) < 1e-4
        versions.append(made.rollouts.version)
    assert versions == [0, 1, 2, 3, 4, 5]


def test_rows_of_a_tied_embedding_are_rows_of_the_head_too(tmp_path):
    """TRL's own head does not know these wrappers, so nothing is trained."""
    model = get_peft_model(small_model(tied=True), lora(trainable_token_indices=[5, 6]))
    made = small_trainer(tmp_path, model, rollout=RolloutConfig(plan="plain", check_sync="off"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.normal_()
    assert made.rollouts.placement.policy.model.config.tie_word_embeddings
    assert gap(made) < 1e-4


def test_layers_that_are_injected_without_a_peft_model_are_decoded_with(tmp_path):
    model = inject_adapter_in_model(lora(target_modules=["q_proj", "down_proj"]), small_model())
    made = small_trainer(tmp_path, model)
    assert made.rollouts.placement._shares is False
    made.train()
    assert gap(made) < 1e-4


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_tied_in_the_config_alone_are_two_when_generating(tmp_path, tied):
    model = small_model(tied=True)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    made = small_trainer(tmp_path, model)
    made.train()
    policy = made.rollouts.placement.policy.model
    assert (policy.lm_head.weight is policy.model.embed_tokens.weight) is tied
    assert gap(made) < 1e-5


def test_embeddings_untied_after_the_trainer_was_made_are_an_error_at_the_next_sync(tmp_path):
    made = small_trainer(tmp_path, small_model(tied=True))
    made.model.lm_head.weight = torch.nn.Parameter(made.model.lm_head.weight.detach() * 2)
    with pytest.raises(InvalidInput, match="were tied when the trainer was made"):
        made.train()


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PROMPT_TUNING"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PREFIX_TUNING"),
    ],
)
def test_prompt_learning_is_refused_by_name(tmp_path, config, name):
    with pytest.raises(InvalidInput, match=f"{name} puts learned states in front"):
        small_trainer(tmp_path, small_model(), peft_config=config)


def test_parameters_that_the_architecture_has_no_use_for_are_refused_by_name(tmp_path):
    model = small_model()
    model.lm_head.register_parameter("gain", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(InvalidInput, match=r"no use for: lm_head\.gain"):
        small_trainer(tmp_path, model)


def test_an_update_of_the_head_that_does_not_arrive_is_an_error_once_it_matters(tmp_path, monkeypatch):
    """Planted: the head's weights stay what they were when they are gathered."""
    monkeypatch.setattr(placement, "copy_weights", without_the_head)
    made = small_trainer(
        tmp_path,
        small_model(),
        peft_config=lora(modules_to_save=["lm_head"]),
        rollout=RolloutConfig(plan="plain"),  # "first": at the weights they begin with, and at the next
    )
    with pytest.raises(WeightSyncError, match="not the one that is trained, at version 1"):
        made.train()


def without_the_head(trainer, policy):
    own = dict(policy.model.named_parameters())
    for key, tensor in full_weights(trainer, policy.model):
        if not key.startswith("lm_head") or trainer.state.global_step == 0:
            own[key].data.copy_(tensor)


def test_a_forward_that_the_architecture_does_not_have_is_an_error_at_the_first_sync(tmp_path):
    model = small_model()
    model.model.norm.register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(WeightSyncError, match="at version 0"):
        small_trainer(tmp_path / "checked", model).train()
    small_trainer(
        tmp_path / "unchecked", model, rollout=RolloutConfig(plan="plain", check_sync="off")
    ).train()


def test_comparing_leaves_modes_and_random_state_alone(tmp_path):
    made = small_trainer(tmp_path, small_model(), peft_config=lora(lora_dropout=0.5))
    made.model.train()
    made.model.base_model.model.model.norm.eval()
    modes = [module.training for module in made.model.modules()]
    state = torch.random.get_rng_state()
    made.rollouts.sync_weights()
    assert [module.training for module in made.model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in made.model.parameters())


def test_a_pool_that_reads_the_weights_differently_is_an_error_at_the_first_sync(tmp_path):
    other = small_model()
    other.save_pretrained(tmp_path / "policy")
    load_tokenizer("tiny").save_pretrained(tmp_path / "policy")
    changed = AutoConfig.from_pretrained(tmp_path / "policy")
    changed.rope_parameters = {**changed.rope_parameters, "rope_theta": 77.0}
    changed.save_pretrained(tmp_path / "policy")
    with (
        RolloutPool.from_pretrained(str(tmp_path / "policy"), plan="plain") as pool,
        pytest.raises(WeightSyncError, match="not the one that is trained, at version 0"),
    ):
        small_trainer(tmp_path, other, rollout=pool).train()
