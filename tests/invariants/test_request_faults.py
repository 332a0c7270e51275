"""What one request brings along may raise: that request ends by name, and its neighbours go on."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from transformers.generation.logits_process import InfNanRemoveLogitsProcessor

from blockroll.errors import InvalidInput
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


def gives_from(length: int, answer):
    return lambda input_ids, scores: scores if input_ids.shape[1] < length else answer(scores)


NO_SCORES = {
    "of some tokens": lambda scores: scores[:, :3].expand(2, -1),
    "of one token": lambda scores: scores[:, :1],  # would be every token's
    "of no batch": lambda scores: scores[0],  # its first number would be every token's
    "of two rows": lambda scores: scores.expand(2, -1),
    "of nothing": lambda scores: None,
    "that are NaN": lambda scores: scores * float("nan"),
    "that are infinite": lambda scores: scores.masked_fill(scores == scores.amax(), float("inf")),
}
NO_MASKS = {
    "of few tokens": lambda allowed: allowed[:, :5],
    "of one row": lambda allowed: allowed[0],
    "of one token": lambda allowed: allowed[:, :1],  # would be every token's
    "of too many rows": lambda allowed: allowed.repeat(3, 1),
    "of no rows": lambda allowed: allowed[:0],
    "of numbers": lambda allowed: allowed.long(),
    "of nothing": lambda allowed: None,
}


@dataclasses.dataclass(frozen=True)
class Anything:
    """A constraint that allows everything, until its guide raises at one of its calls, or gives no masks."""

    raising: str = ""
    after: int = 3
    masks: Callable | None = None  # what becomes of them then

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
        allowed = torch.ones(len(drafts) - first + 1, self.vocab_size, dtype=torch.bool)
        masks = self.constraint.masks
        return allowed if masks is None or self.num_tokens < self.constraint.after else masks(allowed)

    def advance(self, token_ids):
        self.meet("advance")
        self.num_tokens += len(token_ids)


FAULTS = {
    "logits processor": (
        {"logits_processors": (raises_from(8),)},
        "its logits processor function raised",
    ),
    **{
        f"scores {name}": ({"logits_processors": (gives_from(8, answer),)}, "its logits processor")
        for name, answer in NO_SCORES.items()
    },
    **{
        f"masks {name}": ({"constraint": Anything(masks=masks)}, "its constraint gave")
        for name, masks in NO_MASKS.items()
    },
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


def test_processors_one_after_another_mend_what_the_first_gave():
    """Transformers looks at no score before the last processor has run: neither do we."""
    policy = random_policy()
    (request,) = make_requests([(5, 6)], Sampling(max_tokens=12, ignore_eos=True))
    broken = gives_from(6, lambda scores: scores * float("nan"))
    chain = dataclasses.replace(request.sampling, logits_processors=(broken, InfNanRemoveLogitsProcessor()))
    got = run(policy, [dataclasses.replace(request, sampling=chain)], Plan(0))["r0"]
    assert (got.error, len(got.token_ids)) == (None, 12)


@dataclasses.dataclass(frozen=True)
class Starts:
    """A constraint whose start gives this."""

    given: object

    def start(self, vocab_size, tokenizer, end_token_ids):
        if isinstance(self.given, Exception):
            raise self.given
        return self.given


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Starts(KeyError("no such tool")), "cannot start: KeyError"),
        (Starts(None), "gave no guide"),  # or its text would be drawn without it
    ],
)
def test_a_constraint_without_a_guide_is_refused_with_the_request(constraint, message):
    (request,) = make_requests([(5, 6)], Sampling(constraint=constraint))
    with pytest.raises(InvalidInput, match=f"request 'r0' has a constraint .*{message}"):
        run(random_policy(), [request], Plan(0))
