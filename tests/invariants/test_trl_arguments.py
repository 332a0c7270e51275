"""What a TRL trainer's arguments ask for: honoured, or refused by name."""

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from blockroll.config import RolloutConfig
from blockroll.errors import (
    ConfigError,
    InvalidInput,
    MissingDependency,
)
from blockroll.policies.loading import load_tokenizer
from blockroll.rl_loops.trl import GRPOTrainer, RLOOTrainer, require_tested
from blockroll.rl_loops.trl.contract import require_parts
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
    assert "rollout_corr/kl" not in row


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
