"""What one request brings along may raise: that request ends by name, and its neighbours go on."""

import dataclasses
import math

import pytest
import torch

from blockroll.types import Plan, Sampling
from tests.engines import make_requests, run
from tests.equality import assert_same_rollouts
from tests.models import prompts, random_policy

PLANS = pytest.mark.parametrize("plan", [Plan(0), Plan(4), Plan(4, (0, 2, 4))], ids=lambda plan: plan.name)
ODD = 3  # the request that brings something along


class Ends(Exception):
    """Raised by what a request brings along."""


def raises_from(length: int):
    def processor(input_ids, scores):
        if input_ids.shape[1] >= length:
            raise Ends("too long for me")
        return scores

    return processor


def returns_a_wrong_shape(input_ids, scores):
    return scores if input_ids.shape[1] < 8 else scores[:, :3].expand(2, -1)


@dataclasses.dataclass(frozen=True)
class Anything:
    """A constraint that allows everything, until its guide raises at one of its calls."""

    raising: str
    after: int = 3

    def start(self, vocab_size, tokenizer, end_token_ids):
        return Guide(self, vocab_size)


class Guide:
    def __init__(self, constraint, vocab_size):
        self.constraint, self.vocab_size, self.num_tokens = constraint, vocab_size, 0

    def meet(self, name):
        if name == self.constraint.raising and self.num_tokens >= self.constraint.after:
            raise Ends(name)

    def allowed(self, drafts, first):
        self.meet("allowed")
        return torch.ones(len(drafts) - first + 1, self.vocab_size, dtype=torch.bool)

    def advance(self, token_ids):
        self.meet("advance")
        self.num_tokens += len(token_ids)


FAULTS = {
    "logits processor": (
        {"logits_processors": (raises_from(8),)},
        "its logits processor function raised",
    ),
    "processor of a wrong shape": ({"logits_processors": (returns_a_wrong_shape,)}, "its logits processor"),
    "guide's masks": ({"constraint": Anything("allowed")}, "its constraint raised Ends"),
    "guide's walk": ({"constraint": Anything("advance")}, "its constraint raised Ends"),
    "decoding": ({"stop": ("zz",)}, "its text cannot be decoded to look for stop strings: Ends"),
}


def decode(token_ids):
    if len(token_ids) > 5:
        raise Ends("no such text")
    return "?"


@PLANS
@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_request_brings_along_fails_that_request_alone(plan, fault):
    policy = random_policy()
    options, message = FAULTS[fault]
    plain = make_requests([text[:5] for text in prompts(8)], Sampling(max_tokens=16, ignore_eos=True))
    mixed = list(plain)
    mixed[ODD] = dataclasses.replace(plain[ODD], sampling=Sampling(max_tokens=16, ignore_eos=True, **options))
    want = run(policy, plain, plan, max_batch_size=5)
    got = run(policy, mixed, plan, max_batch_size=5, decode=decode)
    failed = got.pop(f"r{ODD}")
    assert failed.finish_reason == "error"
    assert failed.error.startswith(f"RequestFailed: {message}")
    assert failed.error.endswith(f"for request 'r{ODD}'")
    assert 0 < len(failed.token_ids) < 16
    assert failed.token_ids == want.pop(f"r{ODD}").token_ids[: len(failed.token_ids)]
    assert {len(failed.policy_logprobs), len(failed.policy_versions)} == {len(failed.token_ids)}
    assert_same_rollouts(want, got, policy)


def test_a_processor_that_raises_behind_a_rejected_draft_fails_nobody():
    """It is asked about texts that never come to be; only what is committed counts."""
    policy = random_policy()
    (request,) = make_requests([(5, 6)], Sampling(max_tokens=24, ignore_eos=True))
    (want,) = run(policy, [request], Plan(4)).values()
    text, met = (*request.prompt_ids, *want.token_ids), 0

    def only_its_own_text(input_ids, scores):
        nonlocal met
        ids = tuple(input_ids[0].tolist())
        if len(ids) > 2 and ids != text[: len(ids)] and ids[:2] == (5, 6):
            met += 1
            raise Ends("another text")
        return scores

    sampling = dataclasses.replace(request.sampling, logits_processors=(only_its_own_text,))
    (got,) = run(policy, [dataclasses.replace(request, sampling=sampling)], Plan(4)).values()
    assert met > 0
    assert (got.token_ids, got.error) == (want.token_ids, None)


class Only:
    """A constraint that allows one token alone, and cannot walk along any other."""

    def __init__(self, token_id):
        self.token_id = token_id

    def start(self, vocab_size, tokenizer, end_token_ids):
        self.vocab_size = vocab_size
        return self

    def allowed(self, drafts, first):
        is_path = [token_id == self.token_id for token_id in drafts]
        assert all(is_path[:first]), "asked to walk along a token that it does not allow"
        num_rows = len(drafts) - first + 1 if all(is_path) else is_path.index(False) - first + 1
        mask = torch.zeros(num_rows, self.vocab_size, dtype=torch.bool)
        mask[:, self.token_id] = True
        return mask

    def advance(self, token_ids):
        pass


@PLANS
@pytest.mark.parametrize("is_constrained", [True, False], ids=["constrained", "masked"])
def test_a_request_whose_options_together_leave_no_token_ends_by_name_and_alone(plan, is_constrained):
    """A bias of -inf takes the last token that a constraint, or nothing else, had left."""
    policy = random_policy()
    options = (
        {"constraint": Only(7), "logit_bias": {7: -math.inf}}
        if is_constrained
        else {"logit_bias": dict.fromkeys(range(policy.vocab_size), -math.inf)}
    )
    plain = make_requests([text[:5] for text in prompts(8)], Sampling(max_tokens=16, ignore_eos=True))
    mixed = list(plain)
    mixed[ODD] = dataclasses.replace(plain[ODD], sampling=Sampling(max_tokens=16, **options))
    want = run(policy, plain, plan, max_batch_size=5)
    got = run(policy, mixed, plan, max_batch_size=5)
    failed = got.pop(f"r{ODD}")
    assert (failed.finish_reason, failed.token_ids) == ("error", ())
    assert failed.error.startswith("EmptySupport: ")
    del want[f"r{ODD}"]
    assert_same_rollouts(want, got, policy)
