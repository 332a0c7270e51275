"""A GPU draws what the CPU draws, by the rule of equality, and its kernels do what the definitions do."""

import pytest
import torch

from blockroll.kernels.block_attention import RowLayout, block_attention
from blockroll.kernels.block_verify import verify_block
from blockroll.kernels.cache_write import cache_write, places_of
from blockroll.kernels.choice import using
from blockroll.kernels.draft_draw import draw_draft
from blockroll.kernels.lowrank_linear import lowrank_linear
from blockroll.kernels.pages import Pages
from blockroll.kernels.rows import Cut, LogitRows
from blockroll.kernels.selective_logprob import OutputHead, selective_logprob
from blockroll.policies.hf import HFPolicy
from blockroll.types import HISTORY, Plan, Sampling
from tests.engines import make_requests, run
from tests.equality import assert_same_rollouts
from tests.models import prompts, random_model, random_policy

pytestmark = pytest.mark.gpu

PLANS = {
    "plain": Plan(0),
    "two_forward": Plan(4),
    "fused": Plan(4, (0, 2, 4)),
    "history": Plan(4, drafter=HISTORY),
}
EACH_PLAN = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
HEAD_DIM = 32  # the least that kernels serve
GPU = "cuda"


@EACH_PLAN
@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.9}, {"temperature": 0}], ids=["whole", "top_p", "greedy"]
)
def test_a_gpu_draws_what_the_cpu_draws(plan, kernels, options):
    policy = random_policy(head_dim=HEAD_DIM)
    requests = make_requests(prompts(16), Sampling(max_tokens=16, **options))
    drawn = run(HFPolicy(random_model(head_dim=HEAD_DIM).to(GPU)), requests, plan, kernels=kernels)
    assert_same_rollouts(run(policy, requests, plan), drawn, policy)


@EACH_PLAN
@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_captured_graphs_draw_what_forwards_do(plan, kernels):
    policy = HFPolicy(random_model(head_dim=HEAD_DIM).to(GPU))
    requests = make_requests(prompts(16), Sampling(max_tokens=16))
    options = {"max_batch_size": 6, "kernels": kernels}
    captured = run(policy, requests, plan, graphs="on", **options)
    assert_same_rollouts(run(policy, requests, plan, graphs="off", **options), captured, policy)


def test_steps_read_late_draw_what_steps_in_turn_do():
    policy = HFPolicy(random_model(head_dim=HEAD_DIM).to(GPU))
    requests = make_requests(prompts(16), Sampling(max_tokens=16))
    late = run(policy, requests, PLANS["fused"], overlap="on")
    assert_same_rollouts(run(policy, requests, PLANS["fused"], overlap="off"), late, policy)


def both(call):
    """What the definition gives, and what Triton's kernel gives of the same."""
    with using("reference"):
        defined = call()
    with using("triton"):
        return defined, call()


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("width", [32, 64, 128, 256])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 70, "softcap": 5.0}], ids=["plain", "bent"])
def test_attention_over_pages(dtype, allowed, width, options):
    layout, lengths = RowLayout(num_clean=5, width=5, levels=(0, 4)), [0, 1, 17, 700]
    table_BT = torch.randperm(4 * 44, device=GPU).view(4, 44) + 1
    keys, values = (torch.randn((4 * 44 + 1, 2, 16, width), device=GPU, dtype=dtype) for _ in range(2))
    pages = Pages(keys_NGZD=keys, values_NGZD=values, table_BT=table_BT)
    new = [torch.randn((4, heads, layout.num_rows, width), device=GPU, dtype=dtype) for heads in (8, 2, 2)]
    lengths_B = torch.tensor(lengths, device=GPU)
    defined, found = both(lambda: block_attention(*new, pages, layout, lengths_B, **options))
    torch.testing.assert_close(found, defined, rtol=0, atol=allowed)


def test_cache_writes():
    table_BT = torch.arange(1, 9, device=GPU).view(2, 4)
    places = places_of(table_BT, 16, torch.tensor([[3, 4, 5], [30, 31, 32]], device=GPU))
    new = [torch.randn((2, 3, 5, 64), device=GPU) for _ in range(2)]

    def written():
        held = [torch.zeros((9, 3, 16, 64), device=GPU, dtype=torch.bfloat16) for _ in range(2)]
        scratch = tuple(torch.zeros((2, 3, 2, 64), device=GPU, dtype=torch.bfloat16) for _ in range(2))
        pages = Pages(keys_NGZD=held[0], values_NGZD=held[1], table_BT=table_BT)
        cache_write(*new, pages, places, scratch=scratch)
        return *held, *scratch

    for defined, found in zip(*both(written), strict=True):
        assert torch.equal(found, defined)


@pytest.mark.parametrize("vocab_size", [63, 4097, 151_936])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_drafts_and_their_verification(vocab_size, top_p):
    """The same coins draw the same tokens, but where one falls between two by rounding."""
    size, num_drafts = 64, 4
    target_BLV = torch.randn((size, num_drafts + 1, vocab_size), device=GPU) * 3
    draft_BKV = target_BLV[:, :-1] + torch.randn_like(target_BLV[:, :-1])
    scale_B, off_B = (torch.full((size,), each, dtype=torch.float64, device=GPU) for each in (0.8, 0.0))
    cut = None if top_p == 1 else Cut(off_B, off_B + top_p, off_B, is_everywhere=True)
    coins = torch.rand((size, 2 * num_drafts + 1), dtype=torch.float64, device=GPU)

    def step():
        draft = draw_draft(draft_BKV, scale_B, coins[:, :num_drafts], cut=cut, certain=False)
        verdict = verify_block(draft, LogitRows(target_BLV, scale_B, False, cut), coins[:, num_drafts:])
        return draft, verdict

    (want_draft, want), (draft, verdict) = both(step)
    same_B = (draft.token_ids_BK == want_draft.token_ids_BK).all(dim=1)
    assert (~same_B).sum() <= 1
    same_B &= verdict.num_committed_B == want.num_committed_B
    assert (~same_B).sum() <= 2
    is_committed_BL = torch.arange(num_drafts + 1, device=GPU) < want.num_committed_B[:, None]
    for name in ("token_ids_BL", "behavior_logprobs_BL"):
        one, other = (getattr(each, name)[same_B][is_committed_BL[same_B]] for each in (want, verdict))
        torch.testing.assert_close(other, one, rtol=0, atol=0 if name == "token_ids_BL" else 1e-4)


def test_log_probabilities_and_their_gradients():
    states = torch.randn((70, 96), device=GPU, requires_grad=True)
    head = OutputHead(weight_VW=(torch.randn((4097, 96), device=GPU) * 0.1).requires_grad_())
    tokens_N, scale_N = torch.randint(4097, (70,), device=GPU), torch.full((70,), 0.7, device=GPU)

    def step():
        laws = selective_logprob(states, head, tokens_N, scale_N, memory_bytes=1 << 30, with_entropy=True)
        gradients = torch.autograd.grad(laws.logprobs_N.sum(), [states, head.weight_VW])
        return *laws, *gradients

    for defined, found in zip(*both(step), strict=True):
        torch.testing.assert_close(found, defined, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [96, 128])  # of odd and of even tiles
def test_log_probabilities_of_bfloat16_are_those_of_exact_logits(width):
    """The definition rounds logits to the head's type, so it is asked in float64."""
    states = torch.randn((300, width), device=GPU).bfloat16().requires_grad_()
    weight = (torch.randn((4097, width), device=GPU) * 0.1).bfloat16().requires_grad_()
    bias = torch.randn(4097, device=GPU).bfloat16().requires_grad_()
    tokens_N, heat_N = torch.randint(4097, (300,), device=GPU), torch.full((300,), 0.7, device=GPU)

    def step(form, given, memory_bytes):
        head = OutputHead(weight_VW=given[1], bias_V=given[2], softcap=20.0)
        with using(form):
            laws = selective_logprob(
                given[0], head, tokens_N, heat_N, memory_bytes=memory_bytes, with_entropy=True
            )
        return laws, torch.autograd.grad(laws.logprobs_N.sum(), given)

    given = (states, weight, bias)
    exact = tuple(each.detach().double().requires_grad_() for each in given)
    want, gradients = step("reference", exact, 1 << 34)
    found, others = step("triton", given, 1 << 20)  # in many parts
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)
    for got, expected in zip(others, gradients, strict=True):
        assert (got.double() - expected).abs().max() < 0.02 * expected.abs().max()


def test_updates_of_mask_rows():
    base, x = torch.randn((3, 7, 320), device=GPU), torch.randn((3, 7, 192), device=GPU)
    down, up = torch.randn((16, 192), device=GPU) * 0.1, torch.randn((320, 16), device=GPU) * 0.1
    with torch.no_grad():
        defined, found = both(lambda: lowrank_linear(base.clone(), x, down, up, first_row=4, scale=2.0))
    torch.testing.assert_close(found, defined, rtol=0, atol=1e-4)
    assert torch.equal(found[:, :4], base[:, :4])
