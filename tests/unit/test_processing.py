"""Processors and truncation on rows: transformers' formulae, edges, the door, and what fails by name."""

import dataclasses
import itertools
import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from blockroll.config import RolloutConfig, RunConfig, TrainConfig
from blockroll.errors import ConfigError, InvalidInput
from blockroll.kernels.rows.truncation import Cut, truncate
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.run import rollout_sampling
from blockroll.rollout.engine.requests import Limits, check_request
from blockroll.samplers.laws import Laws
from blockroll.samplers.text import Text
from blockroll.types import Law, Plan, Request, Sampling
from tests.engines import make_requests, run
from tests.equality import assert_same_rollouts

# The policy that ships was trained for two-forward; the law of a fused plan is exact all the same.
pytestmark = pytest.mark.filterwarnings("ignore:plan fused.* drafts in a layout")
VOCAB = 50
PROMPT, COMPLETION = (3, 7, 7, 11), [5, 7, 5]


def law_of(sampling: Sampling, logits_1LV, between_1N=None, **options) -> torch.Tensor:
    between_1N = torch.empty((1, 0), dtype=torch.int64) if between_1N is None else between_1N
    text = Text(sampling=sampling, prompt_ids=PROMPT, token_ids=list(COMPLETION), **options)
    laws = Laws.of([text], vocab_size=logits_1LV.shape[-1], device=torch.device("cpu"))
    num_drafts = logits_1LV.shape[1] - 1
    no_drafts = torch.zeros((1, num_drafts, logits_1LV.shape[-1]))
    rows = laws.target_rows(logits_1LV, between_1N, no_drafts, torch.tensor([num_drafts]))
    assert rows.is_empty_BL is None
    return rows.probs_BLV


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        (
            {"top_k": 9, "top_p": 0.7, "min_p": 0.1},
            [TopKLogitsWarper(9), TopPLogitsWarper(0.7), MinPLogitsWarper(0.1)],
        ),
        ({"temperature": 0.6, "top_p": 0.8}, [TemperatureLogitsWarper(0.6), TopPLogitsWarper(0.8)]),
        ({"repetition_penalty": 1.4}, [RepetitionPenaltyLogitsProcessor(1.4)]),
        (
            {"bad_words_ids": ((5, 20), (9,), (7, 5, 21))},
            [NoBadWordsLogitsProcessor([[5, 20], [9], [7, 5, 21]], eos_token_id=0)],
        ),
    ],
)
def test_laws_are_those_of_transformers(options, theirs):
    """Where nothing is tied; behind three tokens that a block has drafted."""
    logits_1LV = torch.randn(1, 4, VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    between_1N = torch.tensor([[20, 5, 30]])
    ours = law_of(Sampling(**options), logits_1LV, between_1N)
    for row in range(4):
        ids = torch.tensor([[*PROMPT, *COMPLETION, *between_1N[0, :row].tolist()]])
        expected = LogitsProcessorList(theirs)(ids, logits_1LV[0, row][None].clone()).softmax(-1)[0]
        assert torch.allclose(ours[0, row], expected, rtol=0, atol=1e-12)


def test_presence_and_frequency_take_from_what_the_completion_holds():
    logits_1LV = torch.zeros(1, 2, VOCAB, dtype=torch.float64)
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    first, second = law_of(sampling, logits_1LV, torch.tensor([[11]]))[0].log()
    others = first[0]
    assert (first - others)[[5, 7, 11, 3]].tolist() == pytest.approx([-1.0, -0.75, 0, 0])
    others = second[0]
    assert (second - others)[[5, 7, 11, 3]].tolist() == pytest.approx([-1.0, -0.75, -0.75, 0])


def test_an_end_token_may_come_once_the_completion_is_long_enough():
    logits_1LV = torch.zeros(1, 4, 20)
    sampling = Sampling(min_tokens=5)
    law = law_of(sampling, logits_1LV, torch.tensor([[1, 1, 1]]), end_token_ids=frozenset({2, 4}))
    assert (law[0, :, [2, 4]] > 0).tolist() == [[False] * 2, [False] * 2, [True] * 2, [True] * 2]


def row(*probs: float) -> torch.Tensor:
    return torch.tensor([[probs]], dtype=torch.float64)


def cut(probs: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[float]:
    return (
        truncate(probs, Cut(torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p])))
        .flatten()
        .tolist()
    )


@pytest.mark.failure(44)
@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"top_p": 0.5}, {0, 1}),
        ({"top_p": 0.51}, {0, 1, 2}),
        ({"top_p": 1e-9}, {0}),
        ({"min_p": 1.0}, {0, 1, 2, 3}),
        ({"top_k": 2, "min_p": 1.0}, {0, 1}),
    ],
)
def test_of_equal_tokens_at_an_edge_those_of_lowest_id_stay(options, kept):
    """FlashInfer once kept all that equal the threshold (failure 44)."""
    law = cut(row(0.25, 0.25, 0.25, 0.25), **options)
    assert {token for token, p in enumerate(law) if p} == kept
    assert sum(law) == pytest.approx(1, abs=1e-15)


def test_a_tie_below_the_best_is_cut_by_id_too():
    assert cut(row(0.1, 0.3, 0.3, 0.3), top_k=2) == pytest.approx([0, 0.5, 0.5, 0])
    assert cut(row(0.3, 0.1, 0.3, 0.3), top_p=0.59) == pytest.approx([0.5, 0, 0.5, 0])


def test_a_request_without_truncation_beside_one_with_it_keeps_its_law_bit_for_bit():
    logits_BLV = torch.randn(2, 3, VOCAB, generator=torch.Generator().manual_seed(2))
    texts = [Text(sampling=Sampling(top_p=top_p), prompt_ids=PROMPT, token_ids=[]) for top_p in (1.0, 0.5)]
    empty = torch.zeros(2, 2, VOCAB)
    arguments = (torch.tensor([[1, 2]] * 2), empty, torch.tensor([2, 2]))
    both = Laws.of(texts, vocab_size=VOCAB, device=torch.device("cpu")).target_rows(logits_BLV, *arguments)
    torch.testing.assert_close(both.probs_BLV[0], logits_BLV[0].double().softmax(-1), atol=1e-12, rtol=0)
    assert (both.probs_BLV[1] == 0).any()


@pytest.mark.failure(19)
def test_logits_are_not_edited_in_place():
    """vLLM once mixed raw and processed logprobs by in-place edits (failure 19)."""
    for dtype in (torch.float32, torch.float64):
        logits_1LV = torch.randn(1, 1, VOCAB, dtype=dtype)
        before = logits_1LV.clone()
        law_of(Sampling(logit_bias={1: 5.0}, repetition_penalty=1.5, bad_words_ids=((9,),)), logits_1LV)
        assert torch.equal(logits_1LV, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "top_k must be at least 0, got -1; 0 keeps all"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"min_p": math.nan}, "min_p must be between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"presence_penalty": math.inf}, "presence_penalty must be a finite number"),
        ({"frequency_penalty": math.nan}, "frequency_penalty must be a finite number"),
        ({"logit_bias": {3: math.nan}}, "logit_bias must be a finite number or -inf"),
        ({"logit_bias": {3: math.inf}}, "logit_bias must be a finite number or -inf"),
        ({"min_tokens": 200}, "min_tokens must be 0 to max_tokens = 128"),
        ({"bad_words_ids": ((1,), ())}, "bad_words_ids must be sequences of at least one token id"),
        ({"law": Law(0.5), "top_p": 0.9}, r"law mixed\(0.5\) together with truncation"),
    ],
)
def test_options_outside_their_range_are_refused(options, message):
    with pytest.raises(InvalidInput, match=message):
        Sampling(**options)


def test_mixing_with_truncation_is_possible_by_name():
    assert Sampling(law=Law(0.5), top_p=0.9, allow_truncated_mix=True).is_truncated


@pytest.fixture(scope="module")
def policy() -> HFPolicy:
    return HFPolicy.from_pretrained("tiny")


class CountsCalls:
    """Suppresses token 5 from its second call on."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, input_ids, scores):
        self.num_calls += 1
        return scores


class RemembersIds:
    def __init__(self) -> None:
        self.seen: set[int] = set()

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[0, list(self.seen)] = -math.inf
        self.seen |= set(input_ids[0].tolist())
        return scores


def drops_a_token(input_ids, scores):
    return scores[:, :-1]


def needs_two_rows(input_ids, scores):
    return scores.reshape(2, -1)[:1]


def raises(input_ids, scores):
    raise KeyError("vision_state")


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (CountsCalls(), "CountsCalls has state of its own that a call changes; write it as a function"),
        (RemembersIds(), "RemembersIds has state of its own"),
        (drops_a_token, "does not return scores of the shape"),
        (needs_two_rows, "does not return scores of the shape"),
        (raises, "cannot be evaluated for one row at a time: 'vision_state'"),
    ],
)
def test_a_processor_that_cannot_be_evaluated_by_row_is_refused_with_advice(policy, processor, message):
    sampling = Sampling(logits_processors=(processor,))
    with pytest.raises(InvalidInput, match=message):
        run(policy, make_requests([(6, 4)], sampling), Plan(2))


def test_a_processor_that_passed_is_not_called_again_at_the_door():
    calls = []

    def counts_itself(input_ids, scores):
        calls.append(tuple(input_ids.shape))
        return scores

    limits = Limits(vocab_size=20, max_length=64)
    requests = make_requests([(1, 2)] * 5, Sampling(logits_processors=(counts_itself,)))
    for request in requests:
        check_request(request, limits)
    assert calls == [(1, 1), (1, 3), (1, 1), (1, 3), (1, 1)]


@pytest.mark.parametrize("plan", [Plan(0), Plan(4), Plan(4, (0, 4))], ids=lambda plan: plan.name)
def test_processors_of_transformers_hold_in_real_rollouts(policy, plan):
    processors = (NoRepeatNGramLogitsProcessor(2),)
    sampling = Sampling(logits_processors=processors, max_tokens=40, ignore_eos=True)
    for rollout in run(policy, make_requests([(6, 4), (5,)] * 4, sampling), plan).values():
        assert rollout.error is None
        text = (*rollout.request.prompt_ids, *rollout.token_ids)
        bigrams = list(itertools.pairwise(text))
        assert len(set(bigrams)) == len(bigrams)


@pytest.mark.parametrize("plan", [Plan(0), Plan(4), Plan(4, (0, 4))], ids=lambda plan: plan.name)
def test_options_hold_in_real_rollouts_and_logprobs_are_what_they_say(policy, plan):
    sampling = Sampling(
        temperature=1.3,
        top_k=4,
        bad_words_ids=((10, 11), (12,)),
        min_tokens=15,
        max_tokens=24,
        presence_penalty=0.2,
    )
    for rollout in run(policy, make_requests([(6, 4), (5, 6, 7)] * 8, sampling), plan).values():
        assert rollout.error is None
        text = (*rollout.request.prompt_ids, *rollout.token_ids)
        assert 12 not in rollout.token_ids
        assert (10, 11) not in set(itertools.pairwise(text))
        assert len(rollout.token_ids) >= 15
        start = len(rollout.request.prompt_ids)
        with torch.inference_mode():
            logits = policy.model(torch.tensor([text]), use_cache=False).logits[0, start - 1 : -1].double()
        ids = torch.tensor(rollout.token_ids)[:, None]
        policy_logprobs = (logits / 1.3).log_softmax(-1).gather(1, ids).flatten()
        assert torch.allclose(policy_logprobs, torch.tensor(rollout.policy_logprobs).double(), atol=1e-4)
        for position, recorded in enumerate(rollout.behavior_logprobs):
            token_law = Laws.of(
                [
                    Text(
                        sampling=sampling,
                        prompt_ids=rollout.request.prompt_ids,
                        token_ids=list(rollout.token_ids[:position]),
                        end_token_ids=frozenset(policy.eos_token_ids),
                    )
                ],
                vocab_size=policy.vocab_size,
                device=policy.device,
            ).target_rows(
                logits[None, position : position + 1],
                torch.empty((1, 0), dtype=torch.int64),
                torch.empty((1, 0, policy.vocab_size)),
                torch.tensor([0]),
            )
            expected = token_law.probs_BLV[0, 0, rollout.token_ids[position]].log().item()
            assert recorded == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("plan", [Plan(0), Plan(4), Plan(4, (0, 4))], ids=lambda plan: plan.name)
def test_a_request_whose_tokens_are_all_masked_fails_by_name_and_alone(policy, plan):
    def nothing_after_five(input_ids, scores):
        return torch.full_like(scores, -math.inf) if input_ids.shape[1] >= 7 else scores

    prompt = (6, 4)
    requests = make_requests([prompt] * 3, Sampling(max_tokens=20, ignore_eos=True))
    failing = dataclasses.replace(
        requests[1],
        sampling=Sampling(max_tokens=20, ignore_eos=True, logits_processors=(nothing_after_five,)),
    )
    alone = run(policy, requests, plan)
    rollouts = run(policy, [requests[0], failing, requests[2]], plan)
    failed = rollouts["r1"]
    assert failed.finish_reason == "error"
    assert failed.error == (
        "EmptySupport: constraint, masks and logits processors leave no next token for request 'r1'"
    )
    assert len(failed.token_ids) <= 5
    assert_same_rollouts([alone["r1"]], [failed], policy, cut=True)
    others = ({name: each[name] for name in ("r0", "r2")} for each in (alone, rollouts))
    assert_same_rollouts(*others, policy)


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"logit_bias": {10_000: 1.0}}, "logit_bias"),
        ({"bad_words_ids": ((1, -1),)}, "bad_words_ids"),
        ({"stop_token_ids": (10_000,)}, "stop_token_ids"),
    ],
)
def test_token_ids_outside_the_vocabulary_are_refused(policy, options, option):
    with pytest.raises(InvalidInput, match=f"in {option}, outside the vocabulary of"):
        run(policy, [Request(request_id="a", prompt_ids=(1,), seed=0, sampling=Sampling(**options))], Plan(0))


def test_a_loop_with_correction_refuses_truncation_unless_told():
    rollout = RolloutConfig(top_p=0.9)
    with pytest.raises(ConfigError, match="average to the mass that is left"):
        rollout_sampling(RunConfig(rollout=rollout))
    for train in (TrainConfig(truncated_rollouts="allow"), TrainConfig(importance_sampling_correction=False)):
        assert rollout_sampling(RunConfig(rollout=rollout, train=train)).top_p == 0.9
    assert rollout_sampling(RunConfig(rollout=RolloutConfig(presence_penalty=0.5))).presence_penalty == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"min_p": 1.5}, "min_p must be between 0 and 1"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
    ],
)
def test_config_values_outside_their_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        RolloutConfig(**options)
