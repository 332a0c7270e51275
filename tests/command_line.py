"""The command line run in this process, and a checkpoint folder it can be run on."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from blockroll import cli
from blockroll.policies.hf import HFPolicy
from blockroll.policies.loading import load_tokenizer


def blockroll(*arguments):
    """Run a command; its result has exit code, stdout and stderr."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def save_random_policy(folder: Path, *, max_length: int = 128, can_draft: bool = True, **options) -> str:
    """A random two-layer Llama with the shipped policy's tokenizer, as a checkpoint folder."""
    tokenizer = load_tokenizer("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    if can_draft:
        config.blockroll = {
            "mask_token_id": tokenizer.mask_token_id,
            "block_sizes": [4],
            "layouts": ["two_forward"],
        }
    HFPolicy(LlamaForCausalLM(config), tokenizer).save_pretrained(folder)
    return str(folder)
