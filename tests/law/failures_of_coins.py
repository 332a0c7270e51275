"""Coins that other engines used twice or shared, each as a check and as a planted bug.

Shapes: B requests, N uniforms, K drafted tokens, L = K + 1 target positions, V vocabulary.
"""

import ast
from pathlib import Path

import torch

import blockroll
from blockroll.kernels import block_verify, draft_draw
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine import step as decoding
from blockroll.rollout.engine.running import RunningRequest
from blockroll.rollout.pool import prompted
from blockroll.rollout.pool.pool import RolloutPool
from blockroll.rollout.pool.replica import LocalReplica
from blockroll.samplers.check import Sampler, check_redraw_uniforms, redraw_uniforms
from blockroll.types import Plan, Sampling
from tests.engines import PlansInTurn, make_requests, run
from tests.equality import assert_same_rollouts
from tests.law.integrate import committed_law, max_difference, target_law
from tests.law.known_failures import (
    FUSED,
    TWO_FORWARD,
    P,
    Q,
    failure,
)
from tests.law.mutants import coin_reused
from tests.law.toys import TOYS
from tests.models import prompts, random_policy


def coins_of_steps() -> list[float]:
    """Every coin of an engine that changes its plan at each step."""
    policy, coins = random_policy(), []

    def remember(record):
        for table in (record.draft_uniforms_BK, record.verify_uniforms_BL, record.settle_uniforms_B):
            coins.extend([] if table is None else table.flatten().tolist())

    planner = PlansInTurn(TWO_FORWARD, FUSED, Plan(0), Plan(2, (0,)))
    sampling = Sampling(max_tokens=24, ignore_eos=True)
    run(policy, make_requests(prompts(60), sampling), planner, observers=(remember,))
    return coins


def redraws_by_the_first_drafts_coin(monkeypatch):
    step_uniforms = decoding.step_uniforms

    def wrong(*arguments, **kwargs):
        drafts, verify = step_uniforms(*arguments, **kwargs)
        if drafts.shape[1]:
            verify = torch.cat(
                [verify[:, : drafts.shape[1]], drafts[:, :1], verify[:, drafts.shape[1] + 1 :]], 1
            )
        return drafts, verify

    monkeypatch.setattr(decoding, "step_uniforms", wrong)


@failure(48, redraws_by_the_first_drafts_coin)
def drafts_coins_and_redraws_share_no_number():
    coins = coins_of_steps()
    assert len(coins) > 3_000
    assert len(set(coins)) == len(coins)


def redraws_by_the_coin_that_rejected(monkeypatch):
    monkeypatch.setattr(block_verify, "verify_block", coin_reused)


@failure(49, redraws_by_the_coin_that_rejected)
def the_redraw_is_uniform_given_the_rejection():
    generator = torch.Generator().manual_seed(5)
    count = 20_000
    draft_uniforms, coins = (
        torch.rand((count, width), generator=generator, dtype=torch.float64) for width in (1, 2)
    )
    logits = torch.tensor(Q, dtype=torch.float64).log()
    draft = draft_draw.draw_draft(logits.expand(count, 1, -1), torch.ones(count), draft_uniforms)
    target = torch.tensor(P, dtype=torch.float64).expand(count, 2, -1)
    verdict = block_verify.verify_block(draft, target, coins)
    rejected = verdict.num_accepted_B == 0
    redraws = redraw_uniforms(
        verdict.token_ids_BL[rejected, 0],
        target[rejected, 0],
        draft_draw.draft_probs(draft, logits.shape[-1])[rejected, 0],
    )
    assert check_redraw_uniforms(redraws).passed
    law = committed_law(
        Sampler(draft_draw.draw_draft, block_verify.verify_block),
        TOYS["four_tokens"],
        [1],
        2,
        is_coin_shared=True,
    )
    assert max_difference(law, target_law(TOYS["four_tokens"], 2)) < 1e-12


DRAWS = ("rand", "randn", "randint", "multinomial", "bernoulli", "exponential_", "uniform_", "random_")
PACKAGE = Path(blockroll.__file__).parent
SOURCES = {
    path: path.read_text()
    for part in ("kernels", "samplers", "rollout", "policies")
    for path in (PACKAGE / part).rglob("*.py")
    if "check" not in path.relative_to(PACKAGE).parts
}


def calls_torchs_own_generator(monkeypatch):
    monkeypatch.setitem(SOURCES, Path("drafter.py"), "import torch\ntoken = torch.multinomial(probs, 1)\n")


@failure(50, calls_torchs_own_generator)
def nothing_that_decodes_draws_from_another_stream():
    drawing = [
        f"{path.name}:{node.lineno} {node.func.attr}"
        for path, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in DRAWS
        and not any(keyword.arg == "generator" for keyword in node.keywords)
    ]
    assert len(SOURCES) > 25
    assert drawing == []


def forgets_what_has_run(monkeypatch):
    state = RunningRequest.state.fget
    forgetful = property(lambda running: (*state(running)[:2], 1234, running.num_tokens))
    monkeypatch.setattr(RunningRequest, "state", forgetful)


@failure(51, forgets_what_has_run)
def coins_differ_from_step_to_step():
    coins = coins_of_steps()
    assert len(set(coins)) == len(coins)


def gives_every_sample_one_seed(monkeypatch):
    monkeypatch.setattr(prompted, "derive_seed", lambda *words: 7)


@failure(52, gives_every_sample_one_seed)
def samples_of_one_prompt_are_distinct_even_one_at_a_time():
    policy = HFPolicy.from_pretrained("tiny")
    engine = Engine(policy, plan=TWO_FORWARD, max_batch_size=1)
    with RolloutPool([LocalReplica(engine, policy.model)], tokenizer=policy.tokenizer) as pool:
        sampling = Sampling(temperature=2.0, max_tokens=24, ignore_eos=True)
        requests = pool.requests(["12+35=?\n"], sampling, num_samples=8)
        texts = {rollout.token_ids for rollout in pool.generate(requests)}
    assert len(texts) == 8


def reads_the_first_seed_alone(monkeypatch):
    step_uniforms = decoding.step_uniforms
    monkeypatch.setattr(
        decoding,
        "step_uniforms",
        lambda seeds, *arguments, **kwargs: step_uniforms(seeds[:1].expand_as(seeds), *arguments, **kwargs),
    )


@failure(53, reads_the_first_seed_alone)
def rows_that_change_places_change_nothing():
    policy = random_policy()
    requests = make_requests(prompts(8), Sampling(max_tokens=16, ignore_eos=True))
    forth, back = (run(policy, order, TWO_FORWARD) for order in (requests, requests[::-1]))
    assert_same_rollouts(forth, back, policy)
