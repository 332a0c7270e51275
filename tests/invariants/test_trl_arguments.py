"""What a TRL trainer's arguments ask for: honoured, or refused by name."""

import dataclasses
import re
from contextlib import nullcontext

import pytest
import trl
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, TrainingArguments

from blockroll.config import RolloutConfig
from blockroll.errors import (
    ConfigError,
    InvalidInput,
    MissingDependency,
)
from blockroll.policies.hf import HFPolicy
from blockroll.policies.loading import load_tokenizer
from blockroll.rl_loops.trl import GRPOTrainer, RLOOTrainer, require_tested
from blockroll.rl_loops.trl.arguments import ELSEWHERE, HONOURED, REFUSED
from blockroll.rl_loops.trl.contract import require_parts
from tests.models import SHAPE
from tests.trl_trainers import logs, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning",  # what TRL itself calls
)


@pytest.mark.parametrize(
    ("cls", "options", "arguments", "advice"),
    [
        (GRPOTrainer, {"use_vllm": True}, {}, "leave use_vllm out"),
        (GRPOTrainer, {"top_p": 0.9}, {}, "vllm_importance_sampling_correction=False"),
        (GRPOTrainer, {"top_k": 5}, {}, "vllm_importance_sampling_correction=False"),
        (GRPOTrainer, {"loss_type": "vespo"}, {}, "token_truncate"),
        (GRPOTrainer, {"temperature": 0.0}, {}, "temperature=0.0: it must be above 0"),
        (RLOOTrainer, {"max_completion_length": None}, {}, "max_completion_length=None"),
        (GRPOTrainer, {"generation_kwargs": {"do_sample": False}}, {}, "generation_kwargs"),
        (GRPOTrainer, {}, {"rollout": RolloutConfig(temperature=0.5)}, "temperature=1.0"),
        (GRPOTrainer, {}, {"rollout": RolloutConfig(max_tokens=9)}, "max_completion_length=48"),
        (RLOOTrainer, {}, {"rollout": RolloutConfig(mix_weight=0.5)}, "RLOO has no importance-sampling"),
    ],
)
def test_what_would_bias_training_is_refused_with_advice(tmp_path, cls, options, arguments, advice):
    with pytest.raises(InvalidInput, match=advice):
        trainer(tmp_path, cls, options=options, **arguments)


def test_truncation_is_served_when_the_correction_is_off(tmp_path):
    made = trainer(tmp_path, options={"top_k": 5, "vllm_importance_sampling_correction": False})
    row = logs(made)[0]
    assert "rollout/acceptance_rate" in row
    assert not [name for name in row if name.startswith("sampling/importance_sampling_ratio")]
    assert row["rollout_corr/rollout_is_mean"] < 1 - 1e-4  # what the law left out of the policy shows


def test_longrope_is_refused_because_trls_padding_would_change_a_texts_factors(tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 4}
    rope |= {"long_factor": [2.0] * 4, "original_max_position_embeddings": 24}
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": 260}, rope_parameters=rope))
    with pytest.raises(InvalidInput, match=r"longrope, whose factors .* Train it with `blockroll train`"):
        trainer(tmp_path, model=model, processing_class=load_tokenizer("tiny"))


def test_another_family_is_named_with_the_way_to_check_it(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=16, n_layer=1, n_head=2, n_positions=128))
    with pytest.raises(InvalidInput, match=r"'gpt2' is not supported.*blockroll doctor --model"):
        trainer(tmp_path, model=model, processing_class=load_tokenizer("tiny"))


@pytest.mark.parametrize("version", ["1.15.2", "1.17.0", "2.0"])
def test_another_trl_is_refused_by_range(version):
    with pytest.raises(MissingDependency, match=r"trl>=1\.16,<1\.17, installed is " + version):
        require_tested(version)


def test_a_trainer_that_lacks_a_part_is_refused_by_its_name(tmp_path):
    made = trainer(tmp_path)
    require_parts(made, ["eos_token_ids"])
    with pytest.raises(MissingDependency, match="GRPOTrainer without _renamed"):
        require_parts(made, ["eos_token_ids", "_renamed"])


def test_truncated_rows_are_refused_as_config_errors(tmp_path):
    with pytest.raises(ConfigError):
        trainer(tmp_path, options={"min_p": 0.1})


def test_the_mixed_law_warns_of_trls_default_and_is_corrected_by_token(tmp_path):
    mixed = RolloutConfig(plan="two_forward", mix_weight=0.5)
    with pytest.warns(UserWarning, match="token_truncate"):
        trainer(tmp_path, rollout=mixed)
    made = trainer(tmp_path, rollout=mixed, options={"vllm_importance_sampling_mode": "token_truncate"})
    row = logs(made)[0]
    assert row["rollout_corr/rollout_is_std"] > 0.01
    assert row["rollout_corr/rollout_is_mean"] == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("config", [trl.GRPOConfig, trl.RLOOConfig])
def test_every_argument_that_trl_adds_is_honoured_refused_or_no_matter_of_generation(config):
    """A release with a new argument fails here: say in `arguments.py` what becomes of it."""
    stock = {field.name for field in dataclasses.fields(TrainingArguments)}
    added = {field.name for field in dataclasses.fields(config)} - stock
    tables = (HONOURED, frozenset(REFUSED), ELSEWHERE)
    places = {name: sum(name in table for table in tables) for name in added}
    assert {name: count for name, count in places.items() if count != 1} == {}


def test_the_tables_name_no_argument_that_trl_does_not_have():
    known = {field.name for cls in (trl.GRPOConfig, trl.RLOOConfig) for field in dataclasses.fields(cls)}
    assert (HONOURED | set(REFUSED) | ELSEWHERE) - known == set()


OTHER_VALUES = {
    "transformers_continuous_batching_config": {"max_memory_percent": 0.2},
    "cache_implementation": "static",
    "vllm_mode": "server",
    "vllm_model_impl": "transformers",
    "vllm_server_base_url": "http://elsewhere",
    "vllm_server_host": "elsewhere",
    "vllm_server_port": 1,
    "vllm_server_timeout": 1.0,
    "vllm_group_port": 1,
    "vllm_gpu_memory_utilization": 0.5,
    "vllm_max_model_length": 64,
    "vllm_tensor_parallel_size": 2,
    "ds3_gather_for_generation": False,
}


@pytest.mark.filterwarnings("ignore:`use_transformers_paged` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_argument_is_refused_by_name_before_the_model_is_loaded(tmp_path, name):
    named = "use_transformers_continuous_batching" if name == "use_transformers_paged" else name
    with pytest.raises(InvalidInput, match=f"GRPOConfig has {named}="):
        trainer(tmp_path, model="no/such/model", options={name: OTHER_VALUES.get(name, True)})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_sample", False),
        ("num_beams", 4),
        ("typical_p", 0.9),
        ("temperature", 0.5),
        ("max_new_tokens", 7),
        ("eos_token_id", 5),
        ("suppress_tokens", [5]),
        ("bad_words_ids", [5]),
        ("logit_bias", {"abc": 1.0}),
        ("stop_strings", 5),
    ],
)
def test_a_generation_kwarg_that_is_not_done_is_refused_by_name(tmp_path, key, value):
    with pytest.raises(InvalidInput, match=f"generation_kwargs has {key}="):
        trainer(tmp_path, options={"generation_kwargs": {key: value}})


def uncorrected(**options):
    return {"vllm_importance_sampling_correction": False, "max_steps": 1, **options}


def drawn(made):
    made.train()
    return [rollout.token_ids for rollout in made.rollouts.trained]


def test_none_among_the_arguments_asks_for_nothing(tmp_path):
    options = {"top_p": None, "top_k": None, "min_p": None, "repetition_penalty": None}
    kwargs = {"min_new_tokens": None, "stop_strings": None, "typical_p": None}
    made = trainer(tmp_path, options={**options, "generation_kwargs": kwargs})
    assert made.rollouts.sampling.is_policy
    assert made.rollouts.sampling.stop == ()


@pytest.mark.slow
def test_generation_kwargs_that_are_options_of_sampling_are_obeyed(tmp_path):
    plain = RolloutConfig(plan="plain")
    digits = [load_tokenizer("tiny")(digit, add_special_tokens=False)["input_ids"] for digit in "0123456789"]
    kwargs = {"min_new_tokens": 20, "bad_words_ids": digits, "do_sample": True, "temperature": 1.0}
    texts = drawn(trainer(tmp_path, rollout=plain, options=uncorrected(generation_kwargs=kwargs)))
    assert min(map(len, texts)) >= 20
    assert not {token for (token,) in digits} & {token for text in texts for token in text}
    stopped = uncorrected(generation_kwargs={"stop_strings": ["+"]})
    made = trainer(tmp_path, rollout=plain, options=stopped)
    made.train()
    reasons = {rollout.finish_reason for rollout in made.rollouts.trained}
    assert "stop" in reasons


@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
def test_a_regular_expression_for_structured_outputs_is_obeyed(tmp_path, cls):
    seen = []

    def reward(completions, **_):
        seen.extend(completions)
        return [float(len(text)) for text in completions]

    options = {"vllm_structured_outputs_regex": "[0-9]{1,8}", "max_completion_length": 12, "max_steps": 1}
    expected = pytest.warns(UserWarning, match="constraint") if cls is GRPOTrainer else nullcontext()
    with expected:
        made = trainer(tmp_path, cls, reward_funcs=reward, options=options)
    made.train()
    assert seen
    assert [text for text in seen if not re.fullmatch("[0-9]{1,8}", text)] == []


def test_a_rollout_func_beside_rollouts_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="both want to generate"):
        trainer(tmp_path, rollout_func=lambda prompts, trainer: {})


def test_a_head_of_higher_precision_than_the_forward_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="cast_lm_head_to_fp32"):
        trainer(tmp_path, options={"cast_lm_head_to_fp32": True, "bf16": True})


def test_every_end_token_ends_a_text_and_is_no_truncation(tmp_path):
    """One that only the model's config names: TRL's own trainers run past it."""
    other = load_tokenizer("tiny")("1", add_special_tokens=False)["input_ids"][0]
    model = HFPolicy.from_pretrained("tiny", with_tokenizer=False).model
    model.set_attn_implementation("sdpa")
    model.config.eos_token_id = [model.config.eos_token_id, other]
    made = trainer(
        tmp_path, model=model, processing_class=load_tokenizer("tiny"), rollout=RolloutConfig(plan="plain")
    )
    assert other in made.eos_token_ids
    row = logs(made)[0]
    texts = [rollout.token_ids for rollout in made.rollouts.trained]
    assert any(text[-1] == other for text in texts)
    assert not any(other in text[:-1] for text in texts)
    assert row["completions/clipped_ratio"] == 0


def test_text_prompts_begin_once_and_never_end(tmp_path):
    """A tokenizer that puts a start token in front, an end token behind, and a text that was templated."""
    tokenizer = load_tokenizer("tiny")
    tokenizer.add_special_tokens({"bos_token": "<|start|>"}) if tokenizer.bos_token is None else None
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A {eos}",
        special_tokens=[(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)],
    )
    made = trainer(tmp_path, processing_class=tokenizer)
    ids, _, _ = made._tokenize_prompts(["1+1=", f"{bos}1+1="])
    assert ids[0] == ids[1]
    assert ids[0].count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids[0]
