"""`selective_logprob`: pieces of bounded memory give the numbers and gradients of the plain formula."""

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
from blockroll.kernels.selective_logprob import (
    OutputHead,
    logprob_of_logits,
    reference,
    rows_within,
    selective_logprob,
)
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.algorithms import GRPO
from blockroll.rl_loops.learner import Learner
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


def bytes_of(rows, vocab_size):
    return rows * vocab_size * 4 * reference.NUMBERS_PER_LOGIT


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
        laws = selective_logprob(
            states,
            OutputHead(weight_VW=policy.output_head.weight, softcap=policy.final_softcap),
            tokens,
            temperatures,
            memory_bytes=bytes_of(rows, policy.vocab_size),
            with_entropy=True,
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
        head = OutputHead(weight_VW=policy.output_head.weight)
        laws = selective_logprob(states, head, torch.arange(600), torch.ones(600), memory_bytes=limit)
        laws.logprobs_N.sum().backward()
    finally:
        is_over.set()
        watcher.join()
    assert peak[0] - before < 1.5 * limit


def plain_formula(states, weight, bias, softcap, tokens, temperatures):
    """In the precision of what is given: one row after another, with nothing shared."""
    laws = []
    for state, token, temperature in zip(states, tokens, temperatures, strict=True):
        logits = weight @ state + (0 if bias is None else bias)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        laws.append((logits / temperature).softmax(dim=-1)[token].log())
    return torch.stack(laws)


def numbers(num_tokens, vocab_size, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=dtype, requires_grad=True)
        for shape in ((num_tokens, 5), (vocab_size, 5), (vocab_size,))
    )
    tokens = torch.randint(vocab_size, (num_tokens,), generator=generator)
    return states, weight, bias, tokens, torch.rand(num_tokens, generator=generator, dtype=dtype) + 0.5


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("num_tokens", "vocab_size", "rows"), [(1, 1, 1), (7, 13, 2), (6, 63, 3), (5, 2, 9)])
def test_values_and_gradients_are_those_of_the_plain_formula(num_tokens, vocab_size, rows, has_bias, softcap):
    states, weight, bias, tokens, temperatures = numbers(num_tokens, vocab_size)
    bias = bias if has_bias else None

    def laws(states, weight, bias):
        head = OutputHead(weight_VW=weight, bias_V=bias, softcap=softcap)
        given = (states, head, tokens, temperatures)
        return selective_logprob(*given, memory_bytes=bytes_of(rows, vocab_size)).logprobs_N

    want = plain_formula(states, weight, bias, softcap, tokens, temperatures)
    torch.testing.assert_close(laws(states, weight, bias), want, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(laws, (states, weight, bias))


@pytest.mark.parametrize("vocab_size", [1, 63, 4097])
def test_float32_values_and_gradients_are_within_1e_5_of_the_plain_formula(vocab_size):
    *exact, tokens, temperatures = numbers(37, vocab_size)
    rough = [each.detach().float().requires_grad_() for each in exact]
    head = OutputHead(weight_VW=rough[1], bias_V=rough[2])
    given = (rough[0], head, tokens, temperatures.float())
    found = selective_logprob(*given, memory_bytes=bytes_of(5, vocab_size)).logprobs_N
    want = plain_formula(*exact, None, tokens, temperatures)
    found.mean().backward()
    want.mean().backward()
    torch.testing.assert_close(found, want.float(), atol=1e-5, rtol=1e-5)
    for got, expected in zip(rough, exact, strict=True):
        torch.testing.assert_close(got.grad, expected.grad.float(), atol=1e-5, rtol=1e-5)


def test_a_temperature_that_takes_no_part_in_the_gradient_is_found_out(monkeypatch):
    """As if the law of temperature 1 were learned from: the gradient check above can fail."""
    real = reference.logit_gradients

    def untempered(logits, softcap, tokens, temperature, gradient):
        return real(logits, softcap, tokens, torch.ones_like(temperature), gradient)

    monkeypatch.setattr(reference, "logit_gradients", untempered)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        test_values_and_gradients_are_those_of_the_plain_formula(7, 13, 2, True, None)


def test_logits_that_are_there_give_the_same_laws():
    states, weight, bias, tokens, temperatures = numbers(7, 13)
    head = OutputHead(weight_VW=weight, bias_V=bias)
    given = (tokens, temperatures)
    found = logprob_of_logits(head.logits(states), *given, with_entropy=True)
    want = selective_logprob(states, head, *given, memory_bytes=bytes_of(2, 13), with_entropy=True)
    torch.testing.assert_close(found.logprobs_N, want.logprobs_N)
    torch.testing.assert_close(found.entropies_N, want.entropies_N)
    law = ((states @ weight.T + bias) / temperatures[:, None]).softmax(dim=-1)
    torch.testing.assert_close(found.entropies_N, -(law * law.log()).sum(dim=-1))


def test_entropies_are_made_only_where_they_are_asked_for():
    states, weight, _, tokens, temperatures = numbers(7, 13)
    for rows in (2, 9):
        given = (states, OutputHead(weight_VW=weight), tokens, temperatures)
        assert selective_logprob(*given, memory_bytes=bytes_of(rows, 13)).entropies_N.shape == (0,)


def test_no_memory_still_gives_one_token_at_a_time():
    assert rows_within(0, 1000) == rows_within(bytes_of(1, 1000), 1000) == 1
    assert rows_within(bytes_of(3, 1000), 1000) == 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({0: torch.zeros(7, 4)}, "give a row of 5 numbers, a token, a temperature for each of N tokens"),
        ({0: torch.zeros(6, 5)}, r"states_NW has shape \(6, 5\)"),
        ({2: torch.zeros(7, 1, dtype=torch.int64)}, r"tokens_N \(7, 1\)"),
        ({2: torch.zeros(7)}, "give int64 tokens"),
        ({3: torch.ones(())}, r"temperature_N \(\)"),
        ({3: torch.ones(7, dtype=torch.int64)}, "temperatures in a floating-point type"),
    ],
)
def test_shapes_and_types_that_do_not_belong_together_are_refused(change, sentence):
    states, weight, _, tokens, temperatures = numbers(7, 13)
    given = dict(enumerate((states, OutputHead(weight_VW=weight), tokens, temperatures))) | change
    with pytest.raises(InvalidInput, match=sentence):
        selective_logprob(*given.values(), memory_bytes=1 << 20)


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
