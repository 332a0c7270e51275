"""GRPO through TRL with a tool: the policy plays a gymnasium environment, several turns in one completion.

    python -m examples.trl_tools --steps 4

Nothing is downloaded: a small Qwen3 with random weights first learns by imitation what a tool call looks like
(half a minute), then GRPO improves what it says in it. What the environment answers is masked from the loss.
"""

import argparse
import random
import string

import gymnasium
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig
from trl.chat_template_utils import qwen3_chat_template

from blockroll import AlignmentConfig, RolloutConfig
from blockroll.config import DraftConfig
from blockroll.rl_loops.envs import from_gymnasium
from blockroll.rl_loops.trl import GRPOTrainer

SPECIAL = (
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
ASK = [{"role": "user", "content": "Play. "}]


class HighDigits(gymnasium.Env[str, str]):
    """One move: name a digit, and win what it is worth."""

    action_space = observation_space = gymnasium.spaces.Text(64, min_length=0, charset=string.printable)

    def reset(self, *, seed: int | None = None, options: object = None) -> tuple[str, dict]:
        """A new game."""
        super().reset(seed=seed)
        return "Name a digit.", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        """The digit's worth, up to 1."""
        worth = int(action) / 9 if action in string.digits and action else 0.0
        return f"{action}!", worth, True, False, {}


def game(digit: str) -> list[dict]:
    """A conversation that names this digit."""
    call = {"type": "function", "function": {"name": "act", "arguments": {"text": digit}}}
    return [
        {"role": "user", "content": "Play. Name a digit."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "act", "content": f"{digit}!\nThe episode is over."},
        {"role": "assistant", "content": "Done."},
    ]


def policy(seed: int, imitation_steps: int) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """A small model that has seen such games, of every digit alike."""
    torch.manual_seed(seed)
    tools = [from_gymnasium(HighDigits)().act]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_words([qwen3_chat_template, str(game("5"))] * 4),
        pad_token="<pad>",
        eos_token="<|im_end|>",
    )
    tokenizer.chat_template = qwen3_chat_template
    games = [tokenizer.apply_chat_template(game(digit), tools=tools)["input_ids"] for digit in string.digits]
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rng = random.Random(seed)
    for _ in range(imitation_steps):
        ids = torch.tensor(rng.sample(games, 4))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


def _words(texts: list[str]) -> Tokenizer:
    """Bytes, and the words that a tool call is made of."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    )
    return words


def main(argv: list[str] | None = None) -> GRPOTrainer:
    """Train and return the trainer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--imitation-steps", type=int, default=80)
    parser.add_argument("--output-dir", default="runs/trl_tools")
    given = parser.parse_args(argv)
    model, tokenizer = policy(0, given.imitation_steps)
    trainer = GRPOTrainer(
        model,
        args=GRPOConfig(
            output_dir=given.output_dir,
            max_steps=given.steps,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=128,
            learning_rate=2e-4,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": ASK, "seed": seed} for seed in range(64)]),
        processing_class=tokenizer,
        environment_factory=from_gymnasium(HighDigits),
        rollout=RolloutConfig(plan="two_forward(4)"),
        alignment=AlignmentConfig(draft=DraftConfig(rank=8, block_sizes=(4,), layouts=("two_forward",))),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    done = main()
    for row in done.state.log_history:
        if "reward" in row:
            print(f"reward {row['reward']:.2f}, tool calls a completion {row['tools/call_frequency']:.2f}")
