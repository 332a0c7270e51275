"""Log-probabilities in pieces of bounded memory: the same numbers and gradients as all at once."""

import copy
import gc
import threading
import time

import psutil
import pytest
import torch
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from blockroll.config import TrainConfig
from blockroll.errors import InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.algorithms import GRPO
from blockroll.rl_loops.learner import Learner
from blockroll.rl_loops.token_laws import BYTES_PER_LOGIT, token_laws
from tests.models import random_model

NUM_TOKENS, WIDTH = 37, 32


def soft_capped(seed):
    model = random_model("gemma2", seed=seed)
    model.config.final_logit_softcapping = 3.0
    return model


def tied(seed):
    model = random_model(seed=seed)
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


MODELS = {"llama": lambda seed: random_model(seed=seed), "soft-capped": soft_capped, "tied": tied}


def laws_and_gradients(model, rows, *, autocast=False):
    """Laws and the gradients of a weighted sum, with `rows` tokens at a time."""
    policy = HFPolicy(copy.deepcopy(model))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(policy.vocab_size, (NUM_TOKENS,), generator=generator)
    temperatures = torch.rand(NUM_TOKENS, generator=generator) + 0.5
    states = torch.randn(NUM_TOKENS, WIDTH, generator=generator) / 3 + policy.model.get_input_embeddings()(
        tokens.roll(1)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        laws = token_laws(
            policy.logits,
            states,
            tokens,
            temperatures,
            parameters=tuple(policy.output_head.parameters()),
            vocab_size=policy.vocab_size,
            memory_bytes=rows * policy.vocab_size * BYTES_PER_LOGIT,
        )
    assert not laws.entropies_N.requires_grad
    (laws.logprobs_N * torch.linspace(-1, 1, NUM_TOKENS)).sum().backward()
    gradients = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    return laws, gradients


@pytest.mark.parametrize("rows", [0, 1, 5, 36])
@pytest.mark.parametrize("name", MODELS)
def test_pieces_give_the_same_laws_and_gradients_as_all_at_once(name, rows):
    model = MODELS[name](0)
    whole, expected = laws_and_gradients(model, NUM_TOKENS)
    pieces, gradients = laws_and_gradients(model, rows)
    torch.testing.assert_close(pieces.logprobs_N, whole.logprobs_N, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(pieces.entropies_N, whole.entropies_N, atol=1e-6, rtol=1e-6)
    assert gradients.keys() == expected.keys()
    assert any("embed_tokens" in name for name in gradients)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], atol=2e-6, rtol=2e-6)


def test_pieces_multiply_in_the_precision_of_autocast_both_ways():
    model = random_model()
    whole, expected = laws_and_gradients(model, NUM_TOKENS, autocast=True)
    pieces, gradients = laws_and_gradients(model, 5, autocast=True)
    torch.testing.assert_close(pieces.logprobs_N, whole.logprobs_N, atol=1e-6, rtol=1e-6)
    plain = laws_and_gradients(model, 5)[1]
    # Of a weight each piece's gradient is rounded by itself; that of the states is row by row.
    states, want, other = (each["model.embed_tokens.weight"] for each in (gradients, expected, plain))
    assert (states - want).abs().max() < 0.05 * (other - want).abs().max()


def test_a_head_that_is_not_trained_gets_no_gradient_and_the_states_get_theirs():
    model = random_model()
    model.lm_head.weight.requires_grad_(False)
    _, expected = laws_and_gradients(model, NUM_TOKENS)
    _, gradients = laws_and_gradients(model, 5)
    assert gradients.keys() == expected.keys() == {"model.embed_tokens.weight"}
    torch.testing.assert_close(*(each["model.embed_tokens.weight"] for each in (gradients, expected)))


def test_the_memory_of_logits_does_not_grow_with_the_tokens():
    """At a large vocabulary: all logits at once would take a gigabyte and a half."""
    vocab_size, limit = 100_000, 256 << 20
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    policy = HFPolicy(Qwen2ForCausalLM(config))
    states = torch.randn(600, 8, requires_grad=True)
    gc.collect()
    process, peak, is_over = psutil.Process(), [0], threading.Event()

    def watch():
        while not is_over.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.005)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        laws = token_laws(
            policy.logits,
            states,
            torch.arange(600),
            torch.ones(600),
            parameters=tuple(policy.output_head.parameters()),
            vocab_size=vocab_size,
            memory_bytes=limit,
        )
        laws.logprobs_N.sum().backward()
    finally:
        is_over.set()
        watcher.join()
    assert peak[0] - before < 1.5 * limit


class Scaled(LlamaForCausalLM):
    """Does something behind its output head, as some families do."""

    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = output.logits / 2
        return output


def test_a_model_that_does_more_behind_its_head_is_refused_by_name():
    model = Scaled(random_model().config)
    with pytest.raises(InvalidInput, match="Scaled does more behind its output head"):
        Learner(HFPolicy(model), TrainConfig(), GRPO())
