"""Training runs of a tiny random policy, for tests."""

import io

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from blockroll.config import PolicyConfig, RolloutConfig, RunConfig, TrainConfig
from blockroll.policies.hf import HFPolicy, load_tokenizer
from blockroll.rl_loops.checkpoint import latest_checkpoint
from blockroll.rl_loops.loop import train
from blockroll.rl_loops.tasks import from_rows

ROWS = [{"prompt": f"{i}+{i}=?"} for i in range(7)]
# Everything of a step but what the clock decides.
TIMES = {"rollout/duration_s", "rollout/generated_tok_s", "perf/update_s", "perf/weight_sync_s", "step_time"}
LOOKED_AT = (
    "drift/calibration/",
    "rollout/target_entropy",
    "rollout/draft_",
    "rollout/block_perplexity_",
)


def even_share(*, completion_ids, **_):
    """Rewards tokens of even id: easy to learn from random weights."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


TASK = from_rows(name="even", train=ROWS, held_out=ROWS[:3], reward_fn=even_share)


def save_policy(folder, seed, layouts=("two_forward",), **options):
    torch.manual_seed(seed)
    tokenizer = load_tokenizer("tiny")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        blockroll={"mask_token_id": 3, "block_sizes": [3], "layouts": [*layouts], "conversion": "full"},
        **options,
    )
    HFPolicy(LlamaForCausalLM(config), tokenizer).save_pretrained(folder)
    return folder


def config_for(tmp_path, policy_path, *, name="run", plan="two_forward", **options):
    options = {
        "steps": 4, "prompts_per_step": 3, "group_size": 4, "learning_rate": 1e-2, "learner_threads": 1,
        "eval_every": 2, "eval_prompts": 3, "checkpoint_every": 2, **options,
    }  # fmt: skip
    return RunConfig(
        name=name,
        runs_dir=str(tmp_path),
        policy=PolicyConfig(path=str(policy_path), device="cpu"),
        rollout=RolloutConfig(backend="local", num_replicas=2, plan=plan, max_tokens=10, max_batch_size=8),
        train=TrainConfig(**options),
    )


def run(config, **arguments):
    return train(config, task=arguments.pop("task", TASK), console=Console(file=io.StringIO()), **arguments)


def untimed(rows):
    """Without what the clock decides, and what engines have seen: which positions they look at is theirs."""
    return [
        {key: value for key, value in row.items() if key not in TIMES and not key.startswith(LOOKED_AT)}
        for row in rows
    ]


def weights_of(run_dir):
    return HFPolicy.from_pretrained(latest_checkpoint(run_dir), device="cpu").model.state_dict()


def stop_after(step, error):
    def callback(metrics):
        if metrics["step"] == step:
            raise error

    return callback
