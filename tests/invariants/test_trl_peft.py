"""PEFT under a TRL trainer: the generating model is the trained one."""

import pytest
import torch
from peft import LoraConfig

from tests.trl_trainers import logs, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning",  # what TRL itself calls
)


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
