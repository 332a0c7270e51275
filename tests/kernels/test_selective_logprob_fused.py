"""`selective_logprob` as Triton's kernels, interpreted, against the plain formula in float64.

Everything that is left uninitialized holds NaN. The interpreter cuts bfloat16 off where GPUs round it.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blockroll.config import TrainConfig
from blockroll.errors import InvalidInput
from blockroll.kernels.choice import Chosen, using
from blockroll.kernels.selective_logprob import OutputHead, fused, fused_tiles, selective_logprob
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.algorithms import GRPO
from blockroll.rl_loops.learner import Learner
from tests.kernels.far_apart import far_apart
from tests.kernels.planted import planted
from tests.models import random_model
from tests.unit.test_learner import BATCH, worth

MANY = 1 << 30  # bytes: all entries at once


@pytest.fixture(autouse=True)
def _uninitialized_is_nan():
    """What `torch.empty` gives, while algorithms are deterministic."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    assert torch.ones(3).new_empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _triton():
    with using("triton"):
        yield


def numbers(num_rows, vocab_size, width, *, dtype=torch.float32, has_bias=False, seed=0):
    """States, weight, bias, tokens, temperatures, and what the log-probabilities are weighed with."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    states, weight = normal(num_rows, width), 3 * width**-0.5 * normal(vocab_size, width)
    bias = normal(vocab_size) if has_bias else None
    tokens = torch.randint(vocab_size, (num_rows,), generator=generator)
    temperature = torch.rand(num_rows, generator=generator) + 0.5
    return states, weight, bias, tokens, temperature, torch.randn(num_rows, generator=generator)


def plain_formula(states, weight, bias, softcap, tokens, temperature):
    """One row after another, with nothing shared."""
    logprobs, entropies = [], []
    for state, token, heat in zip(states, tokens, temperature, strict=True):
        logits = weight @ state + (0 if bias is None else bias)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        law = (logits / heat).softmax(dim=-1)
        logprobs.append(law[token].log())
        entropies.append(-(law * law.log()).sum())
    return torch.stack(logprobs), torch.stack(entropies)


def check(num_rows, vocab_size, width, *, dtype=torch.float32, has_bias=False, softcap=None, memory=MANY):
    """Values and gradients against the plain formula of the same numbers."""
    *given, tokens, temperature, weights = numbers(
        num_rows, vocab_size, width, dtype=dtype, has_bias=has_bias
    )
    given = [each if each is None else each.requires_grad_() for each in given]
    exact = [each if each is None else each.detach().double().requires_grad_() for each in given]
    head = OutputHead(weight_VW=given[1], bias_V=given[2], softcap=softcap)
    laws = selective_logprob(given[0], head, tokens, temperature, memory_bytes=memory, with_entropy=True)
    want, entropies = plain_formula(*exact, softcap, tokens, temperature.double())
    assert laws.logprobs_N.dtype == torch.float32
    torch.testing.assert_close(laws.logprobs_N, want.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(laws.entropies_N, entropies.float(), atol=1e-5, rtol=1e-5)
    assert not laws.entropies_N.requires_grad
    (laws.logprobs_N * weights).sum().backward()
    (want * weights).sum().backward()
    for got, expected in zip(given, exact, strict=True):
        if got is not None:
            assert got.grad.dtype == dtype
            # Float32 within 1e-5; the gradients of bfloat16 logits are cut to 8 bits before they are summed.
            bound = (1e-5 if dtype == torch.float32 else 0.02) * max(1, expected.grad.abs().max())
            torch.testing.assert_close(got.grad.double(), expected.grad, atol=bound, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "width", "has_bias", "softcap"),
    [
        (1, 1, 1, True, None),
        (37, 63, 64, True, 2.0),  # one tile that the vocabulary does not fill
        (70, 129, 100, False, None),  # a width that no tile divides
        (130, 130, 128, False, 30.0),  # two blocks of tokens
    ],
)
def test_values_and_gradients_are_those_of_the_plain_formula(
    dtype, num_rows, vocab_size, width, has_bias, softcap
):
    check(num_rows, vocab_size, width, dtype=dtype, has_bias=has_bias, softcap=softcap)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [
        (4097, torch.float32),
        pytest.param(4097, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(32_000, torch.float32, marks=pytest.mark.slow),
        pytest.param(33_000, torch.bfloat16, marks=pytest.mark.slow),  # sections of more than one tile
    ],
    ids=str,
)
def test_large_vocabularies_are_summed_section_by_section(vocab_size, dtype):
    check(5, vocab_size, 64, dtype=dtype)


def test_sections_of_several_tiles_are_summed_tile_by_tile(monkeypatch):
    monkeypatch.setattr(fused, "MAX_SECTIONS", 2)
    check(20, 300, 64, has_bias=True, softcap=2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_memory_makes_gradients_of_few_entries_at_a_time(dtype):
    largest = Largest()
    with largest:
        check(66, 300, 64, dtype=dtype, has_bias=True, memory=1)
    assert largest.of(dtype, 66) == 66 * 128


class Largest(TorchDispatchMode):
    """The tensors that torch makes, by type and shape."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        if (
            isinstance(found, torch.Tensor) and found.is_floating_point()
        ):  # others are the interpreter's copies
            self.made.add((found.dtype, tuple(found.shape), found.numel()))
        return found

    def of(self, dtype, num_rows):
        """Most numbers of a tensor with so many rows, over 64 columns."""
        return max(
            size
            for kind, shape, size in self.made
            if kind == dtype and len(shape) == 2 and shape[0] == num_rows
        )


def test_no_tensor_is_as_large_as_the_logits():
    largest = Largest()
    states, weight, _, tokens, temperature, _ = numbers(70, 600, 64)
    states.requires_grad_(), weight.requires_grad_()
    with largest:
        head = OutputHead(weight_VW=weight)
        laws = selective_logprob(
            states, head, tokens, temperature, memory_bytes=70 * 4 * 256, with_entropy=True
        )
        laws.logprobs_N.sum().backward()
    assert max(size for _, _, size in largest.made) == weight.numel() < 70 * 600


def test_a_token_has_the_same_bits_whichever_are_beside_it():
    """At equal places of a block: the interpreter multiplies by a BLAS, to which places matter."""
    states, weight, _, tokens, temperature, _ = numbers(133, 300, 64, dtype=torch.bfloat16)
    head = OutputHead(weight_VW=weight)

    def laws(rows):
        given = (states[rows], head, tokens[rows], temperature[rows])
        return selective_logprob(*given, memory_bytes=MANY, with_entropy=True)

    everything = laws(slice(None))
    for rows, places in (
        ([0], [0]),
        ([128], [0]),
        ([128, 5, 3], [0]),
        ([9, 1, 2, 131, 7], [1, 2, 3]),
        (range(20), range(20)),
    ):
        for some, among in zip(laws([*rows]), everything, strict=True):
            assert torch.equal(some[[*places]], among[[*rows]][[*places]])


def test_equal_calls_give_equal_bits():
    states, weight, _, tokens, temperature, weights = numbers(70, 300, 64)

    def gradients():
        given = [each.clone().requires_grad_() for each in (states, weight)]
        head = OutputHead(weight_VW=given[1])
        laws = selective_logprob(given[0], head, tokens, temperature, memory_bytes=1)
        return laws.logprobs_N, *torch.autograd.grad((laws.logprobs_N * weights).sum(), given)

    for one, other in zip(gradients(), gradients(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # of the interpreter's maximum
def test_a_row_that_is_not_a_number_spoils_no_other():
    states, weight, _, tokens, temperature, weights = numbers(40, 300, 64)
    head = OutputHead(weight_VW=weight)
    want = selective_logprob(states, head, tokens, temperature, memory_bytes=MANY, with_entropy=True)
    states[7, 3] = torch.nan
    states.requires_grad_()
    found = selective_logprob(states, head, tokens, temperature, memory_bytes=MANY, with_entropy=True)
    others = torch.arange(40) != 7
    for got, expected in zip(found, want, strict=True):
        assert got[7].isnan()
        assert torch.equal(got[others], expected[others])
    (found.logprobs_N * weights).sum().backward()
    assert states.grad[7].isnan().all()
    assert states.grad[others].isfinite().all()


def test_entries_of_no_probability_count_nowhere():
    states, weight, _, tokens, temperature, _ = numbers(9, 200, 64)
    bias = torch.zeros(200)
    bias[128:] = -torch.inf  # a whole tile of them, behind all others
    tokens = tokens % 128
    given = (tokens, temperature)
    kept = selective_logprob(
        states, OutputHead(weight_VW=weight[:128]), *given, memory_bytes=MANY, with_entropy=True
    )
    head = OutputHead(weight_VW=weight, bias_V=bias)
    found = selective_logprob(states, head, *given, memory_bytes=MANY, with_entropy=True)
    torch.testing.assert_close(found.logprobs_N, kept.logprobs_N)
    torch.testing.assert_close(found.entropies_N, kept.entropies_N)


def test_logits_far_from_zero_lose_no_entropy():
    """A moment that is not taken relative to the largest logit would cancel."""
    states, weight, _, tokens, temperature, _ = numbers(9, 200, 64)
    bias = torch.full((200,), 3000.0)
    heads = [OutputHead(weight_VW=weight, bias_V=each) for each in (None, bias)]
    near, far = (
        selective_logprob(states, head, tokens, temperature, memory_bytes=MANY, with_entropy=True)
        for head in heads
    )
    torch.testing.assert_close(far.entropies_N, near.entropies_N, atol=2e-3, rtol=0)
    torch.testing.assert_close(far.logprobs_N, near.logprobs_N, atol=2e-3, rtol=0)


def test_a_token_outside_the_vocabulary_has_no_law():
    states, weight, _, tokens, temperature, _ = numbers(5, 130, 64)
    tokens[:3] = torch.tensor([-1, 130, 255])
    laws = selective_logprob(states, OutputHead(weight_VW=weight), tokens, temperature, memory_bytes=MANY)
    assert laws.logprobs_N.isnan().tolist() == [True, True, True, False, False]
    assert laws.entropies_N.shape == (0,)


def test_no_tokens_have_no_laws_and_gradients_of_zero():
    states, weight, _, tokens, temperature, _ = numbers(0, 130, 64)
    states.requires_grad_(), weight.requires_grad_()
    head = OutputHead(weight_VW=weight)
    laws = selective_logprob(states, head, tokens, temperature, memory_bytes=MANY, with_entropy=True)
    assert laws.logprobs_N.shape == laws.entropies_N.shape == (0,)
    laws.logprobs_N.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert states.grad.shape == (0, 64)


def test_only_what_is_trained_gets_a_gradient():
    states, weight, bias, tokens, temperature, _ = numbers(9, 130, 64, has_bias=True)
    bias.requires_grad_()
    head = OutputHead(weight_VW=weight, bias_V=bias)
    selective_logprob(states, head, tokens, temperature, memory_bytes=MANY).logprobs_N.sum().backward()
    assert (states.grad, weight.grad) == (None, None)
    assert bias.grad.isfinite().all()


def test_rows_further_apart_than_an_int32_counts_are_found(monkeypatch):
    torch.use_deterministic_algorithms(False)  # which would fill all the memory between them
    states, weight, _, tokens, temperature, _ = numbers(3, 4, 64, dtype=torch.bfloat16)
    near, far = (
        selective_logprob(states, OutputHead(weight_VW=each), tokens, temperature, memory_bytes=MANY)
        for each in (weight, far_apart(weight, monkeypatch))
    )
    assert torch.equal(near.logprobs_N, far.logprobs_N)


def test_autocast_multiplies_in_its_type_and_gradients_keep_their_own():
    states, weight, _, tokens, temperature, weights = numbers(40, 130, 64)
    given = [each.clone().requires_grad_() for each in (states, weight)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        head = OutputHead(weight_VW=given[1])
        laws = selective_logprob(given[0], head, tokens, temperature, memory_bytes=MANY)
    low = OutputHead(weight_VW=weight.bfloat16())
    want = selective_logprob(states.bfloat16(), low, tokens, temperature, memory_bytes=MANY)
    assert torch.equal(laws.logprobs_N, want.logprobs_N)
    found = torch.autograd.grad((laws.logprobs_N * weights).sum(), given)
    assert {each.dtype for each in found} == {torch.float32}


PLANTED = {
    "a running sum that is not brought to the new maximum": ("total = old * total +", "total = total +"),
    "entries behind the vocabulary that count": (
        'scaled += tl.where(entry < vocab_size, 0.0, float("-inf"))[None, :]',
        "scaled += 0.0",
    ),
    "an entropy whose moment stays with the old maximum": (
        "moment = old * (moment + total * tl.maximum(largest - shift, NOTHING))",
        "moment = old * moment",
    ),
    "sections that are added as they are": (
        "whole = tl.sum(total * share, axis=1)",
        "whole = tl.sum(total, axis=1)",
    ),
    "a temperature that takes no part in the gradient": (
        "factor = tl.load(gradients + rows) * inverse",
        "factor = tl.load(gradients + rows)",
    ),
    "a cap that takes no part in the gradient": ("gradient *= 1 - ", "gradient *= 1 - 0 * "),
    "a bias that is left out": ("logits += tl.load(bias + entries)[None, :]", "logits += 0.0"),
    "a chosen token that is not counted in its own gradient": (
        "(tl.where(is_chosen, 1.0, 0.0) - law)",
        "(0.0 - law)",
    ),
}


@pytest.mark.parametrize("wrong", PLANTED)
def test_a_kernel_with_one_line_wrong_is_found(wrong, tmp_path, monkeypatch):
    made = planted(tmp_path, fused_tiles, *PLANTED[wrong])
    for name in ("sections", "join", "gradients_of_logits"):
        monkeypatch.setattr(fused, name, getattr(made, name))
    monkeypatch.setattr(fused, "MAX_SECTIONS", 2)  # of two tiles
    with pytest.raises(AssertionError):
        check(20, 300, 64, has_bias=True, softcap=2.0)


def test_a_product_that_forgets_what_was_added_before_is_found(tmp_path, monkeypatch):
    right = "total = tl.load(at, mask=is_inside, other=0.0)"
    made = planted(tmp_path, fused_tiles, right, "total = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)")
    monkeypatch.setattr(fused, "add_product", made.add_product)
    with pytest.raises(AssertionError):
        check(20, 300, 64, dtype=torch.bfloat16, memory=1)


def test_the_learner_moves_its_weights_as_with_the_definition():
    """Two optimizer steps, forward and backward through the kernels."""
    torch.use_deterministic_algorithms(False)
    moved = []
    for form in ("reference", "triton"):
        learner = Learner(
            HFPolicy(random_model()),
            TrainConfig(learner_threads=1, learning_rate=1e-2),
            GRPO(),
            kernels="reference",
        )
        learner.kernels = Chosen(form, "a test")
        for _ in range(2):
            metrics = learner.update(BATCH, worth(1.0, -0.5, 2.0, -1.0))
        moved.append((metrics, [each.detach() for each in learner.model.parameters()]))
    (want, weights), (found, others) = moved
    assert found["entropy"] == pytest.approx(want["entropy"], abs=1e-5)
    assert found["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
    for one, other in zip(weights, others, strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("states", "weight", "sentence"),
    [
        (torch.ones(3, 8), torch.ones(5, 8).double(), "multiplies in torch.float64"),
        (torch.ones(3, 8).half(), torch.ones(5, 8).half(), "multiplies in torch.float16.*convert the model"),
        (torch.ones(8, 3).T, torch.ones(5, 8), r"states_NW has strides \(1, 3\).*contiguous"),
        (torch.ones(3, 8), torch.ones(8, 5).T, r"head.weight_VW has strides \(1, 5\)"),
        (torch.ones(3, 1), torch.ones(1, 1).expand(2**31, 1), "has 2147483648 entries"),
    ],
)
def test_what_no_kernel_serves_is_refused_by_name(states, weight, sentence):
    given = (states, OutputHead(weight_VW=weight), torch.zeros(3, dtype=torch.int64), torch.ones(3))
    with pytest.raises(InvalidInput, match=sentence):
        selective_logprob(*given, memory_bytes=MANY)
