"""TRL makes log-probabilities of states tile by tile itself: of the same law as ours, in bounded memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blockroll.kernels.selective_logprob import OutputHead, selective_logprob
from blockroll.policies.hf import HFPolicy
from blockroll.policies.loading import load_tokenizer
from blockroll.rl_loops.trl import GRPOTrainer, RLOOTrainer
from tests.models import random_model
from tests.trl_trainers import trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning",  # what TRL itself calls
)

TEXTS, PROMPT, COMPLETION = 3, 5, 20
TILE = 32_768  # of the vocabulary, in TRL


class Sizes(TorchDispatchMode):
    """How many numbers each tensor that torch makes has."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        if isinstance(found, torch.Tensor):
            self.made.add(found.numel())
        return found


def made_of(folder, vocab_size, cls, **options):
    model = random_model(vocab_size=vocab_size, tie_word_embeddings=False)
    HFPolicy(model, load_tokenizer("tiny")).save_pretrained(folder / "policy")
    return trainer(folder, cls, model=str(folder / "policy"), options=options)


def scored(made, vocab_size):
    """Log-probabilities, entropies and the head's gradient as TRL computes a loss's, and tensors' sizes."""
    ids = torch.randint(vocab_size, (TEXTS, PROMPT + COMPLETION), generator=torch.Generator().manual_seed(0))
    made.model.eval()
    sizes = Sizes()
    with sizes:
        logprobs, entropies, _ = made._get_per_token_logps_and_entropies(
            made.model, ids, torch.ones_like(ids), COMPLETION, compute_entropy=True
        )
        (gradient,) = torch.autograd.grad(logprobs.sum(), [made.model.lm_head.weight])
    return ids, logprobs.detach(), entropies.detach(), gradient, sizes.made


@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
def test_a_trainers_law_and_its_gradient_are_those_of_the_operation(tmp_path, cls):
    vocab_size = 1_000
    made = made_of(tmp_path, vocab_size, cls, temperature=0.7)
    ids, logprobs, entropies, gradient, _ = scored(made, vocab_size)
    with torch.no_grad():
        states = made.model.base_model(input_ids=ids).last_hidden_state[:, PROMPT - 1 : -1].flatten(0, 1)
    weight = made.model.lm_head.weight
    laws = selective_logprob(
        states,
        OutputHead(weight_VW=weight),
        ids[:, PROMPT:].flatten(),
        torch.full((TEXTS * COMPLETION,), 0.7),
        memory_bytes=1,
        with_entropy=True,
    )
    torch.testing.assert_close(logprobs.flatten(), laws.logprobs_N, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies.flatten(), laws.entropies_N, atol=1e-5, rtol=1e-5)
    (own,) = torch.autograd.grad(laws.logprobs_N.sum(), [weight])
    torch.testing.assert_close(gradient, own, atol=1e-5, rtol=1e-5)


def test_no_tensor_of_a_trainers_loss_has_all_tokens_by_all_of_the_vocabulary(tmp_path):
    """Beside weights and their gradients the largest is a tile, at any vocabulary."""
    vocab_size = 100_000
    made = made_of(tmp_path, vocab_size, GRPOTrainer)
    *_, sizes = scored(made, vocab_size)
    num_tokens = TEXTS * (PROMPT + COMPLETION - 1)  # on a CPU TRL scores prompts too
    weight = made.model.lm_head.weight.numel()
    assert max(sizes - {weight}) == num_tokens * TILE < num_tokens * vocab_size
