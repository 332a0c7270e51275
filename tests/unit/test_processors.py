"""transformers' own logits processors are served, also those that prepare something at their first call."""

import pytest
import torch
import transformers

from blockroll.errors import InvalidInput
from blockroll.rollout.engine.processors import check_processor
from blockroll.types import Plan, Sampling
from tests.engines import make_requests, run
from tests.equality import assert_same_rollouts
from tests.models import VOCAB_SIZE, prompts, random_policy

SERVED = [
    transformers.SuppressTokensLogitsProcessor([4, 5]),
    transformers.SuppressTokensAtBeginLogitsProcessor([4], 1),
    transformers.MinNewTokensLengthLogitsProcessor(1, 3, 2, device="cpu"),
    transformers.MinLengthLogitsProcessor(3, 2, device="cpu"),
    transformers.SequenceBiasLogitsProcessor([[[3], 2.0], [[4, 5], -1.0]]),
    transformers.NoBadWordsLogitsProcessor([[3], [4, 5]], eos_token_id=2),
    transformers.RepetitionPenaltyLogitsProcessor(1.2),
    transformers.NoRepeatNGramLogitsProcessor(2),
    transformers.TopPLogitsWarper(0.9),
    transformers.TypicalLogitsWarper(0.9),
    transformers.EtaLogitsWarper(0.01),
    transformers.ForcedEOSTokenLogitsProcessor(9, 2, device="cpu"),
    transformers.ExponentialDecayLengthPenalty((2, 1.1), 2, 1),
    transformers.WatermarkLogitsProcessor(VOCAB_SIZE, "cpu"),
    transformers.PrefixConstrainedLogitsProcessor(lambda batch_id, ids: [4, 5, 6], 1),
    transformers.LogitsProcessorList([transformers.SuppressTokensLogitsProcessor([4])]),
]


@pytest.mark.parametrize("processor", SERVED, ids=lambda processor: type(processor).__name__)
def test_a_processor_that_is_a_function_of_its_row_is_served(processor):
    check_processor(processor, VOCAB_SIZE)


@pytest.mark.parametrize("plan", [Plan(0), Plan(4)], ids=lambda plan: plan.name)
@pytest.mark.parametrize("processor", SERVED[:6], ids=lambda processor: type(processor).__name__)
def test_a_processor_gives_the_tokens_of_one_that_has_prepared_nothing(processor, plan):
    """Each request with its own, or all with one that has been called before."""
    policy = random_policy()
    sampling = Sampling(max_tokens=8, logits_processors=(processor,))
    first = run(policy, make_requests(prompts(4), sampling), plan)
    again = run(policy, make_requests(prompts(4), sampling), plan)
    assert_same_rollouts(first, again, policy)


class Counts:
    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores


class RemembersTheFirstLength:
    """Prepared once, and by whatever it was first given."""

    length = None

    def __call__(self, input_ids, scores):
        if self.length is None:
            self.length = input_ids.shape[1]
        return scores


class RemembersTokens:
    def __init__(self):
        self.seen = torch.zeros(VOCAB_SIZE)

    def __call__(self, input_ids, scores):
        self.seen[input_ids[0]] += 1
        return scores


REFUSED = [
    Counts(),
    RemembersTheFirstLength(),
    RemembersTokens(),
    transformers.SynthIDTextWatermarkLogitsProcessor(
        ngram_len=3,
        keys=[1, 2, 3],
        sampling_table_size=16,
        sampling_table_seed=0,
        context_history_size=8,
        device=torch.device("cpu"),
    ),
]


@pytest.mark.parametrize("processor", REFUSED, ids=lambda processor: type(processor).__name__)
def test_a_processor_that_remembers_its_calls_is_refused(processor):
    with pytest.raises(InvalidInput, match="has state of its own that a call changes"):
        check_processor(processor, VOCAB_SIZE)


def test_the_check_leaves_a_users_processor_as_it_was():
    processor = transformers.SequenceBiasLogitsProcessor([[[3], 2.0]])
    before = dict(vars(processor))
    check_processor(processor, VOCAB_SIZE)
    assert vars(processor) == before
