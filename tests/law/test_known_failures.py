"""Bugs that other engines shipped: each is a check that production passes and that the planted bug fails.

The numbers are those of docs/failures.md, which names the projects and says where each number is tested.

Shapes: B requests, N uniforms, K drafted tokens, L = K + 1 target positions, V vocabulary.
"""

import ast
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import blockroll
from blockroll.config import RolloutConfig, RunConfig
from blockroll.errors import ConfigError, InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.run import rollout_sampling
from blockroll.rollout.engine import step as decoding
from blockroll.rollout.engine.engine import Engine
from blockroll.rollout.engine.running import RunningRequest
from blockroll.rollout.pool import pool as pool_module
from blockroll.rollout.pool.pool import RolloutPool
from blockroll.rollout.pool.replica import LocalReplica
from blockroll.samplers import laws as laws_module
from blockroll.samplers import lossless, uniforms
from blockroll.samplers import processing as processing_module
from blockroll.samplers.check import Sampler, check_redraw_uniforms, redraw_uniforms
from blockroll.samplers.laws import Laws
from blockroll.types import Draft, Law, Plan, Sampling
from tests.engines import PlansInTurn, make_requests, run
from tests.equality import assert_same_rollouts
from tests.law.engine_law import Processing, engine_law, processed_law
from tests.law.integrate import committed_law, max_difference, target_law
from tests.law.mutants import coin_reused, final_from_target
from tests.law.toys import TOYS
from tests.models import prompts, random_policy

TWO_FORWARD, FUSED = Plan(4), Plan(4, (0, 2, 4))
P, Q = [0.5, 0.2, 0.2, 0.1], [0.2, 0.5, 0.1, 0.2]  # target and draft of the four-token fixture
LARGEST = 1 - 2.0**-53  # the largest uniform there is


class Failure(NamedTuple):
    """`check` raises AssertionError where the bug is; `plant` puts it there, through pytest's monkeypatch."""

    check: Callable[[], None]
    plant: Callable[[pytest.MonkeyPatch], None]


FAILURES: dict[int, Failure] = {}


def failure(number: int, plant: Callable[[pytest.MonkeyPatch], None]):
    def register(check: Callable[[], None]) -> Callable[[], None]:
        FAILURES[number] = Failure(check, plant)
        return check

    return register


def stratified(count: int) -> torch.Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def sample(plan: Plan = TWO_FORWARD, *, count: int = 24, **options):
    """A random policy, its rollouts, and the target rows each committed token was drawn from."""
    policy, rows = random_policy(), []

    def remember(record):
        committed = record.verdict.num_committed_B.tolist()
        rows.extend(
            (record.request_ids[b], record.target_probs_BLV[b, i].clone())
            for b in range(len(committed))
            for i in range(committed[b])
        )

    sampling = Sampling(max_tokens=24, ignore_eos=True, **options)
    rollouts = run(policy, make_requests(prompts(count), sampling), plan, observers=(remember,))
    return policy, list(rollouts.values()), rows


def causal_logits(policy, rollout):
    ids = torch.tensor([[*rollout.request.prompt_ids, *rollout.token_ids]])
    with torch.no_grad():
        logits = policy.model(ids, use_cache=False).logits[0].double()
    return logits[len(rollout.request.prompt_ids) - 1 : -1]


# --- log-probabilities --------------------------------------------------------------------------


def reports_the_processed_law_as_the_policys(monkeypatch):
    monkeypatch.setattr(Laws, "policy_logprobs", lambda laws, logits, verdict: verdict.behavior_logprobs_BL)


@failure(19, reports_the_processed_law_as_the_policys)
def raw_and_processed_logprobs_are_each_what_they_say():
    policy, rollouts, _ = sample(temperature=0.7, top_k=5)
    for rollout in rollouts:
        scaled = causal_logits(policy, rollout) / 0.7
        ids = torch.tensor(rollout.token_ids)[:, None]
        raw = scaled.log_softmax(-1).gather(1, ids).flatten()
        kept = scaled.topk(5).values.logsumexp(-1)
        assert torch.allclose(torch.tensor(rollout.policy_logprobs).double(), raw, atol=1e-4)
        processed = scaled.gather(1, ids).flatten() - kept
        assert torch.allclose(torch.tensor(rollout.behavior_logprobs).double(), processed, atol=1e-3)


def takes_truncation_for_none(monkeypatch):
    monkeypatch.setattr(Sampling, "is_truncated", property(lambda sampling: False))


@failure(20, takes_truncation_for_none)
def a_correction_that_truncation_would_bias_is_refused():
    for options in ({"top_p": 0.8}, {"top_k": 4}, {"min_p": 0.2}):
        with pytest.raises(ConfigError, match="average to the mass that is left"):
            rollout_sampling(RunConfig(rollout=RolloutConfig(**options)))


def loses_a_logprob(monkeypatch):
    commit = RunningRequest.commit

    def forgetful(running, token_ids, is_draft, policy, *others, **step):
        return commit(running, token_ids, is_draft, policy[: max(1, len(policy) - 1)], *others, **step)

    monkeypatch.setattr(RunningRequest, "commit", forgetful)


@failure(26, loses_a_logprob)
def every_column_has_an_entry_per_token():
    for plan in (Plan(0), TWO_FORWARD, FUSED):
        for rollout in sample(plan)[1]:
            columns = (rollout.policy_logprobs, rollout.behavior_logprobs, rollout.policy_versions)
            assert {len(column) for column in columns} == {len(rollout.token_ids)}


def wrong_verdicts(monkeypatch, change):
    """Both places that verify, with what they report changed."""
    for name in ("verify_block", "settle_first"):
        original = getattr(decoding, name)
        monkeypatch.setattr(
            decoding,
            name,
            lambda draft, probs, coins, original=original: change(original(draft, probs, coins), probs),
        )


def reports_zero(monkeypatch):
    wrong_verdicts(
        monkeypatch,
        lambda verdict, _: dataclasses.replace(
            verdict, behavior_logprobs_BL=torch.zeros_like(verdict.behavior_logprobs_BL)
        ),
    )


@failure(27, reports_zero)
def mean_surprisal_is_mean_entropy():
    """Also what a silently greedy sampler would fail (39): its tokens surprise too little."""
    for plan in (Plan(0), TWO_FORWARD, FUSED):
        _, rollouts, rows = sample(plan, count=40)
        entropies = torch.stack([-(row * row.log()).sum() for _, row in rows])
        spread = torch.stack([(row * row.log() ** 2).sum() for _, row in rows]) - entropies**2
        surprisal = -math.fsum(value for rollout in rollouts for value in rollout.behavior_logprobs)
        num_tokens = sum(len(rollout.token_ids) for rollout in rollouts)
        # Rows of tokens that a length cut off are few: they are in the sum of entropies by their mean.
        expected = entropies.mean().item() * num_tokens
        assert abs(surprisal - expected) < 5 * math.sqrt(spread.mean().item() * num_tokens)


def reports_the_row_behind(monkeypatch):
    def shifted(verdict, probs):
        logprobs = probs.roll(-1, dims=1)[:, : verdict.token_ids_BL.shape[1]]
        return dataclasses.replace(
            verdict,
            behavior_logprobs_BL=logprobs.gather(-1, verdict.token_ids_BL[..., None]).squeeze(-1).log(),
        )

    wrong_verdicts(monkeypatch, shifted)


@failure(28, reports_the_row_behind)
def logprobs_of_a_busy_batch_are_those_of_the_text():
    for plan in (TWO_FORWARD, FUSED):
        policy, rollouts, _ = sample(plan)
        assert any(rollout.stats.num_accepted < rollout.stats.num_drafted for rollout in rollouts)
        for rollout in rollouts:
            ids = torch.tensor(rollout.token_ids)[:, None]
            fresh = causal_logits(policy, rollout).log_softmax(-1).gather(1, ids).flatten()
            assert torch.allclose(torch.tensor(rollout.behavior_logprobs).double(), fresh, atol=1e-4)


# --- the law of a sampler -----------------------------------------------------------------------


def scores_drafts_by_their_softmax(monkeypatch):
    """At temperature 1, whatever temperature they were drawn at; at 0 a soft law is invented."""
    draw_draft = lossless.draw_draft

    def wrong(logits, temperature, uniforms_BK, num_drafts=None, **kwargs):
        draft = draw_draft(logits, temperature, uniforms_BK, num_drafts, **kwargs)
        return dataclasses.replace(draft, probs_BKV=logits.double().softmax(-1))

    monkeypatch.setattr(laws_module, "draw_draft", wrong)


@failure(33, scores_drafts_by_their_softmax)
def the_draft_law_returned_is_the_law_drawn_from():
    for plan in (Plan(2), Plan(2, (0, 2))):
        law, _ = engine_law(TOYS["hot"], plan, length=3)
        assert max_difference(law, target_law(TOYS["hot"], 3)) < 1e-12


def draws_from_rounded_logits(monkeypatch):
    target_probs = lossless.target_probs

    def wrong(logits, temperature, uniforms_BK, num_drafts=None, **kwargs):
        tokens = lossless.inverse_cdf(target_probs(logits.bfloat16(), temperature), uniforms_BK)
        batch, width = uniforms_BK.shape
        return Draft(
            token_ids_BK=tokens,
            probs_BKV=target_probs(logits, temperature),
            num_drafts_B=torch.full((batch,), width),
        )

    monkeypatch.setattr(lossless, "draw_draft", wrong)


@failure(34, draws_from_rounded_logits)
def drafts_are_drawn_from_the_logits_that_score_them():
    count = 100_000
    logits_V = 3 * torch.randn(64, generator=torch.Generator().manual_seed(3))
    draft = lossless.draw_draft(logits_V[None, None], torch.ones(1), torch.full((1, 1), 0.5))
    tokens = lossless.draw_draft(
        logits_V.expand(count, 1, -1), torch.ones(count), stratified(count)[:, None]
    ).token_ids_BK
    counts = torch.bincount(tokens.flatten(), minlength=64)
    assert ((counts - count * draft.probs_BKV[0, 0]).abs() <= 1).all()


def fixture_law(verify) -> torch.Tensor:
    """The law of one token of the fixture: a coin on either side of each threshold, stratified redraws."""
    count, law = 1000, torch.zeros(4, dtype=torch.float64)
    target = torch.tensor([[P, P]], dtype=torch.float64).expand(count, -1, -1)
    for drafted in range(4):
        draft = Draft(
            token_ids_BK=torch.full((count, 1), drafted),
            probs_BKV=torch.tensor([[Q]], dtype=torch.float64).expand(count, -1, -1),
            num_drafts_B=torch.ones(count, dtype=torch.int64),
        )
        accepted = min(1.0, P[drafted] / Q[drafted])
        for coin, share in ((accepted / 2, accepted), ((1 + accepted) / 2, 1 - accepted)):
            coins = torch.stack([torch.full((count,), coin, dtype=torch.float64), stratified(count)], dim=1)
            tokens = verify(draft, target, coins).token_ids_BL[:, 0]
            law += Q[drafted] * share * torch.bincount(tokens, minlength=4) / count
    return law


def redraws_from_the_target(monkeypatch):
    monkeypatch.setattr(lossless, "_final_weights", lambda target, draft, *, is_rejected_B: target)


@failure(35, redraws_from_the_target)
def a_rejected_position_is_redrawn_from_the_residual():
    law = fixture_law(lossless.verify_block)
    assert torch.allclose(law, torch.tensor(P, dtype=torch.float64), atol=2e-3)


def takes_missing_probabilities_for_a_point_mass(monkeypatch):
    def invent(draft):
        if draft.probs_BKV is None:
            one_hot = torch.nn.functional.one_hot(draft.token_ids_BK, 4).double()
            object.__setattr__(draft, "probs_BKV", one_hot)

    monkeypatch.setattr(Draft, "__post_init__", invent)


@failure(36, takes_missing_probabilities_for_a_point_mass)
def drafts_without_their_law_are_refused():
    with pytest.raises(InvalidInput, match="the law they were drawn from"):
        Draft(token_ids_BK=torch.zeros((1, 1), dtype=torch.int64), probs_BKV=None, num_drafts_B=torch.ones(1))


@failure(37, scores_drafts_by_their_softmax)
def greedy_drafts_are_point_masses_and_the_weight_counts():
    toy = TOYS["argmax_draft"]
    lossless_law, _ = engine_law(toy, Plan(2), length=2)
    assert max_difference(lossless_law, target_law(toy, 2)) < 1e-12
    mixed_law, corrected = engine_law(toy, Plan(2), length=2, weight=0.5)
    assert max_difference(corrected, target_law(toy, 2)) < 1e-12
    assert max_difference(mixed_law, lossless_law) > 1e-2


def truncates_the_last_row_alone(monkeypatch):
    truncate = processing_module.truncate

    def wrong(probs, *options):
        return torch.cat([probs[:, :-1], truncate(probs[:, -1:], *options)], dim=1)

    monkeypatch.setattr(laws_module, "truncate", wrong)


@failure(38, truncates_the_last_row_alone)
def truncation_reaches_accepted_and_redrawn_tokens():
    """Edits of logits have planted versions of their own in test_processing.py."""
    processing = Processing(options={"min_p": 0.41})
    law, _ = engine_law(TOYS["stochastic"], Plan(2, (0, 2)), length=3, processing=processing)
    assert max_difference(law, processed_law(TOYS["stochastic"], processing, 3)) < 1e-12


def maps_what_is_not_finite_to_zero(monkeypatch):
    monkeypatch.setattr(decoding, "_without_non_finite", lambda logits: (logits.nan_to_num(), None))


def spoiled(rows: str):
    """Rollouts of a policy whose draft or verify rows are NaN for one request of three."""
    policy = random_policy()
    original = getattr(policy, rows)

    def spoil(*arguments):
        setattr(policy, rows, original)  # the first step alone
        logits = original(*arguments).clone()
        logits[1] = math.nan
        return logits

    setattr(policy, rows, spoil)
    return run(policy, make_requests(prompts(3), Sampling(max_tokens=8)), TWO_FORWARD)


@failure(40, maps_what_is_not_finite_to_zero)
def draft_rows_that_are_not_finite_fail_their_request():
    rollouts = spoiled("draft_logits")
    assert rollouts["r1"].error is not None
    assert "draft logits hold NaN" in rollouts["r1"].error
    assert rollouts["r0"].error is None


@failure(41, maps_what_is_not_finite_to_zero)
def verify_rows_that_are_not_finite_fail_their_request():
    rollouts = spoiled("verify_logits")
    assert rollouts["r1"].error is not None
    assert "verify logits hold NaN" in rollouts["r1"].error
    assert rollouts["r1"].token_ids == ()
    assert rollouts["r2"].error is None


def forgets_to_mask_the_last_tile(monkeypatch):
    inverse_cdf = lossless.inverse_cdf

    def wrong(weights_V, coins):
        missing = -weights_V.shape[-1] % 1024
        return inverse_cdf(torch.nn.functional.pad(weights_V, (0, missing), value=0.1), coins)

    monkeypatch.setattr(lossless, "inverse_cdf", wrong)


@failure(42, forgets_to_mask_the_last_tile)
def no_id_lies_outside_the_vocabulary():
    for size in (8193, 10_000, 151_936):
        for num_padded in (0, 3):
            weights_V = torch.full((size,), 0.1, dtype=torch.float64)
            weights_V[size - num_padded :] = 0
            coins = torch.tensor([2.0**-53, 0.5, LARGEST], dtype=torch.float64)
            tokens = lossless.inverse_cdf(weights_V.expand(3, -1), coins)
            assert (tokens < size - num_padded).all()


def rounds_the_largest_words_to_one(monkeypatch):
    monkeypatch.setattr(
        uniforms, "u52", lambda high, low: (((high << 21) | (low >> 11)).double() + 0.5) * 2.0**-53
    )


@failure(43, rounds_the_largest_words_to_one)
def uniforms_lie_strictly_between_zero_and_one():
    words = torch.tensor([0, 0xFFFFFFFF])
    coins = uniforms.u52(words, words)
    assert (coins > 0).all()
    assert (coins < 1).all()


def keeps_all_that_equal_the_threshold(monkeypatch):
    def wrong(probs, top_k, top_p, min_p):
        threshold = probs.topk(int(top_k[0]), dim=-1).values[..., -1:]
        kept = torch.where(probs >= threshold, probs, 0.0)
        return kept / kept.sum(dim=-1, keepdim=True)

    monkeypatch.setattr(processing_module, "truncate", wrong)


@failure(44, keeps_all_that_equal_the_threshold)
def of_equal_tokens_at_the_edge_the_lowest_ids_stay():
    probs = torch.tensor([[[0.4, 0.2, 0.2, 0.2]]], dtype=torch.float64)
    law = processing_module.truncate(probs, torch.tensor([2]), torch.ones(1), torch.zeros(1))
    assert law.flatten().nonzero().flatten().tolist() == [0, 1]


def trusts_an_empty_residual(monkeypatch):
    monkeypatch.setattr(
        lossless, "_final_weights", lambda target, draft, *, is_rejected_B: (target - draft).clamp(min=0)
    )


@failure(45, trusts_an_empty_residual)
def a_rejection_that_rounding_made_draws_from_the_target():
    count = 1000
    law = torch.tensor(P, dtype=torch.float64)
    draft = Draft(
        token_ids_BK=torch.zeros((count, 1), dtype=torch.int64),
        probs_BKV=law.expand(count, 1, -1),
        num_drafts_B=torch.ones(count, dtype=torch.int64),
    )
    coins = torch.stack([torch.full((count,), 1.5, dtype=torch.float64), stratified(count)], dim=1)
    tokens = lossless.verify_block(draft, law.expand(count, 2, -1), coins).token_ids_BL[:, 0]
    assert ((torch.bincount(tokens, minlength=4) - count * law).abs() <= 1).all()


def cuts_a_block_by_its_own_tokens(monkeypatch):
    draw = Laws.draw

    def wrong(laws, logits, coins, num_drafts):
        draft = draw(laws, logits, coins, num_drafts)
        is_liked_B = (draft.token_ids_BK == 1).any(dim=1)
        return dataclasses.replace(draft, num_drafts_B=torch.where(is_liked_B, 0, num_drafts))

    monkeypatch.setattr(Laws, "draw", wrong)


@failure(47, cuts_a_block_by_its_own_tokens)
def how_far_a_block_reaches_does_not_depend_on_what_was_drafted():
    law, _ = engine_law(TOYS["opposite"], Plan(2, (0, 2)), length=2)
    assert max_difference(law, target_law(TOYS["opposite"], 2)) < 1e-12


# --- coins --------------------------------------------------------------------------------------


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
    monkeypatch.setattr(lossless, "verify_block", coin_reused)


@failure(49, redraws_by_the_coin_that_rejected)
def the_redraw_is_uniform_given_the_rejection():
    generator = torch.Generator().manual_seed(5)
    count = 20_000
    draft_uniforms, coins = (
        torch.rand((count, width), generator=generator, dtype=torch.float64) for width in (1, 2)
    )
    logits = torch.tensor(Q, dtype=torch.float64).log()
    draft = lossless.draw_draft(logits.expand(count, 1, -1), torch.ones(count), draft_uniforms)
    target = torch.tensor(P, dtype=torch.float64).expand(count, 2, -1)
    verdict = lossless.verify_block(draft, target, coins)
    rejected = verdict.num_accepted_B == 0
    redraws = redraw_uniforms(
        verdict.token_ids_BL[rejected, 0], target[rejected, 0], draft.probs_BKV[rejected, 0]
    )
    assert check_redraw_uniforms(redraws).passed
    law = committed_law(
        Sampler(lossless.draw_draft, lossless.verify_block), TOYS["four_tokens"], [1], 2, is_coin_shared=True
    )
    assert max_difference(law, target_law(TOYS["four_tokens"], 2)) < 1e-12


DRAWS = ("rand", "randn", "randint", "multinomial", "bernoulli", "exponential_", "uniform_", "random_")
PACKAGE = Path(blockroll.__file__).parent
SOURCES = {
    path: path.read_text()
    for part in ("samplers", "rollout", "policies")
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
    monkeypatch.setattr(RunningRequest, "state", property(lambda running: (*state(running)[:2], 1234)))


@failure(51, forgets_what_has_run)
def coins_differ_from_step_to_step():
    coins = coins_of_steps()
    assert len(set(coins)) == len(coins)


def gives_every_sample_one_seed(monkeypatch):
    monkeypatch.setattr(pool_module, "derive_seed", lambda *words: 7)


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


PLANTED = pytest.mark.parametrize(
    "number", [pytest.param(number, marks=pytest.mark.failure(number)) for number in sorted(FAILURES)]
)


@PLANTED
def test_production_does_not_have_the_bug(number):
    FAILURES[number].check()


@PLANTED
def test_the_planted_bug_is_found(number, monkeypatch):
    FAILURES[number].plant(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        FAILURES[number].check()


@pytest.mark.failure(35)
def test_a_redraw_from_the_target_has_its_known_law():
    law = fixture_law(final_from_target)
    assert torch.allclose(law, torch.tensor([0.40, 0.28, 0.18, 0.14], dtype=torch.float64), atol=2e-3)


@pytest.mark.failure(22)
def test_the_weight_of_a_rollout_is_a_product_not_a_sum():
    (rollout,) = sample(count=1, law=Law(0.5))[1]
    two = dataclasses.replace(
        rollout,
        token_ids=(1, 2),
        policy_logprobs=(math.log(0.5), math.log(0.25)),
        behavior_logprobs=(math.log(0.25), math.log(0.5)),
        policy_versions=(0, 0),
    )
    assert math.exp(two.log_ratio) == pytest.approx(2 * 0.5)


def always_takes_the_best(monkeypatch):
    def best(cumulative_V, coins):
        return torch.cat([cumulative_V[..., :1], cumulative_V.diff(dim=-1)], dim=-1).argmax(dim=-1)

    monkeypatch.setattr(lossless, "_search", best)


@pytest.mark.failure(39)
@pytest.mark.parametrize("plan", [Plan(0), TWO_FORWARD, FUSED], ids=lambda plan: plan.name)
def test_at_temperature_one_tokens_are_not_the_best_ones(plan, monkeypatch):
    """A sampler that is silently greedy takes the likeliest token every time."""

    def share_of_best() -> float:
        policy, rollouts, _ = sample(plan)
        best = []
        for rollout in rollouts:
            best.append(causal_logits(policy, rollout).argmax(-1) == torch.tensor(rollout.token_ids))
        return torch.cat(best).double().mean().item()

    production = share_of_best()
    always_takes_the_best(monkeypatch)
    assert production < 0.5
    assert share_of_best() > production + 0.1
