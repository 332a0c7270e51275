"""Steps in which each request has its own number of drafts, in one forward that computes no row too many."""

import dataclasses
import sys

import pytest
import torch

from blockroll.rollout.audit.check import check_audit
from blockroll.rollout.audit.writer import AuditWriter
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine import step as decoding
from blockroll.rollout.engine.drafting import Drafter, Verifying
from blockroll.types import POINT_MASS, Draft, Plan, Sampling
from tests.engines import causal_logprobs, make_requests, run
from tests.equality import assert_same_rollouts
from tests.models import FAMILIES, VOCAB_SIZE, prompts, random_policy

K = 6
PLAN = Plan(K, drafter="uneven")
SAMPLING = Sampling(max_tokens=24, ignore_eos=True)


class Uneven(Drafter):
    """Half of all steps of a request draft nothing, the others up to K tokens: its text alone says what."""

    name = "uneven"

    def __init__(self, *, most=K):
        self.most = most

    def drafts_of(self, running):
        token_ids = running.token_ids
        number = (sum(token_ids) + 3 * len(token_ids)) % 12
        count = min((0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 4, K)[number], self.most)
        return [(token_ids[-1] * (i + 3) + number) % VOCAB_SIZE for i in range(count)]

    def propose(self, step):
        drafts = [self.drafts_of(running) for running in step.batch]
        width = max(map(len, drafts))
        return Draft(
            token_ids_BK=torch.tensor([each + [0] * (width - len(each)) for each in drafts]).long(),
            law=POINT_MASS,
            num_drafts_B=torch.tensor([len(each) for each in drafts]),
        )


def packing_policy(family="llama"):
    """One that packs however little that saves."""
    policy = random_policy(family)
    policy.least_saved_rows = 1
    return policy


class Watch:
    def __init__(self):
        self.traces = []

    def __call__(self, trace):
        self.traces.append(trace)

    @property
    def num_packed(self):
        return sum(trace.forward_rows.is_packed for trace in self.traces)


def serve(policy, requests, drafter=None, **options):
    return run(policy, requests, PLAN, drafters=[drafter or Uneven()], **options)


def accepted(rollouts):
    return sum(rollout.stats.num_accepted for rollout in rollouts.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_the_same_alone_and_in_any_batch(family):
    policy = packing_policy(family)
    requests = make_requests(prompts(7), SAMPLING)
    alone = {}
    for each in requests:
        alone |= serve(policy, [each])
    assert accepted(alone) > 0
    for size in (2, 7):
        watch = Watch()
        assert_same_rollouts(alone, serve(policy, requests, max_batch_size=size, observers=[watch]), policy)
        assert watch.num_packed > 0 or size == 2
    for rollout in alone.values():
        got = torch.tensor(rollout.policy_logprobs).double()
        assert torch.allclose(got, causal_logprobs(policy, rollout), atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"top_k": 5, "top_p": 0.9},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.2},
        {"min_tokens": 6, "ignore_eos": False, "bad_words_ids": ((5,), (6, 7))},
        {"logit_bias": {5: 2.0}},
    ],
    ids=str,
)
def test_options_of_sampling_go_by_packed_rows_as_by_padded_ones(options, monkeypatch):
    policy = packing_policy()
    requests = make_requests(prompts(8), dataclasses.replace(SAMPLING, **options))
    # Beside requests that nothing edits: their log-probabilities come from the rows themselves.
    requests[::2] = make_requests(prompts(8), SAMPLING)[::2]
    packed = serve(policy, requests, observers=[watch := Watch()])
    assert watch.num_packed > 0
    monkeypatch.setattr(decoding, "packing_of", lambda *_: None)
    padded = serve(policy, requests, observers=[watch := Watch()])
    assert watch.num_packed == 0
    assert_same_rollouts(padded, packed, policy)


def test_a_step_says_its_rows_and_is_no_wider_than_its_longest_draft():
    policy = packing_policy()
    watch = Watch()
    serve(policy, make_requests(prompts(8), SAMPLING), observers=[watch])
    widths = set()
    for trace in watch.traces:
        num_drafts = trace.draft.num_drafts_B.tolist()
        size, width, num_rows = trace.forward_rows
        assert (size, width) == (len(trace.requests), max(num_drafts) + 1)
        assert num_rows == (sum(num_drafts) + size if trace.forward_rows.is_packed else size * width)
        assert trace.verify_uniforms_BL.shape == trace.verdict.token_ids_BL.shape == (size, width)
        widths.add(width)
    assert len(widths) > 2


def test_steps_in_which_nobody_drafts_are_plain_ones():
    policy = packing_policy()
    requests = make_requests(prompts(5), SAMPLING)
    drafted = serve(policy, requests, Uneven(most=0), observers=[watch := Watch()])
    assert {trace.forward_rows for trace in watch.traces} == {(5, 1, 5)}
    assert {rollout.stats.num_drafted for rollout in drafted.values()} == {0}
    greedy = make_requests(prompts(5), dataclasses.replace(SAMPLING, temperature=0))
    assert_same_rollouts(run(policy, greedy, Plan(0)), serve(policy, greedy, Uneven(most=0)), policy)


def test_an_audit_of_steps_of_any_width_passes_at_both_levels(tmp_path):
    policy = packing_policy()
    serve(policy, make_requests(prompts(6), SAMPLING), observers=[AuditWriter(tmp_path)], max_batch_size=4)
    report = check_audit(sorted(tmp_path.glob("*.parquet")), policy_of=lambda version: policy)
    assert report.problem is None
    assert report.num_rows == 6 * SAMPLING.max_tokens


def test_drafts_past_the_end_of_the_context_are_verified_and_cut():
    """Slots have room for the widest block behind the longest text, and no more."""
    policy = packing_policy()
    requests = make_requests(prompts(6, longest=20), Sampling(max_tokens=96, ignore_eos=True))
    rollouts = serve(policy, requests, max_length=30)
    for rollout in rollouts.values():
        assert rollout.finish_reason == "length"
        assert len(rollout.request.prompt_ids) + len(rollout.token_ids) == 30


class VerifiesItself(Uneven):
    """Knows nothing of packed windows."""

    def verify(self, step, ids_BL, window):
        return Verifying(logits_BLV=step.policy.verify_logits(ids_BL, window))


def test_a_drafter_that_verifies_a_whole_rectangle_is_served_too():
    policy = packing_policy()
    requests = make_requests(prompts(8), SAMPLING)
    assert_same_rollouts(serve(policy, requests), serve(policy, requests, VerifiesItself()), policy)


def test_logits_that_are_not_finite_fail_the_one_request_whose_rows_they_are():
    policy = packing_policy()
    requests = make_requests(prompts(8), SAMPLING)
    undisturbed = serve(policy, requests)
    verify, num_spoiled = policy.verify_packed, 0

    def spoiled(ids_BL, packing, window):
        nonlocal num_spoiled
        logits_NV = verify(ids_BL, packing, window)
        slots = [slot for slot, count in enumerate(packing.num_rows) if count > 1]
        if not num_spoiled and slots:
            num_spoiled = 1
            logits_NV = logits_NV.clone()
            logits_NV[packing.starts_B[slots[0]] + 1, 3] = torch.nan
        return logits_NV

    policy.verify_packed = spoiled
    served = serve(policy, requests)
    failed = [name for name, rollout in served.items() if rollout.finish_reason == "error"]
    assert len(failed) == 1
    assert "NonFiniteLogits" in served[failed[0]].error
    rest = {name: rollout for name, rollout in served.items() if name not in failed}
    assert_same_rollouts({name: undisturbed[name] for name in rest}, rest, policy)


class Interrupted:
    """Raises KeyboardInterrupt at the n-th call made from files of packed forwards, once."""

    def __init__(self, number):
        self.number, self.count = number, 0

    def __call__(self, frame, event, argument):
        name = frame.f_code.co_filename
        if event == "call" and name.endswith(
            ("layout.py", "ragged.py", "packed.py", "policies/attention.py")
        ):
            self.count += 1
            if self.count == self.number:
                raise KeyboardInterrupt


@pytest.mark.parametrize("number", [*range(1, 40, 3), 100, 1000])
def test_an_interrupt_inside_a_packed_forward_loses_nothing(number):
    policy = packing_policy()
    requests = make_requests(prompts(5), SAMPLING)
    undisturbed = serve(policy, requests)
    engine = Engine(policy, plan=PLAN, drafters=[Uneven()])
    engine.submit(requests)
    finished, interrupted = {}, Interrupted(number)
    while engine.num_requests:
        sys.setprofile(interrupted)
        try:
            step = engine.step()
        except KeyboardInterrupt:
            continue
        finally:
            sys.setprofile(None)
        engine.check_integrity()
        finished |= {each.request.request_id: each for each in step.finished}
    assert interrupted.count > number
    assert_same_rollouts(undisturbed, finished, policy)


def test_a_packed_forward_that_raises_is_run_again_and_nothing_is_lost():
    policy = packing_policy()
    requests = make_requests(prompts(8), SAMPLING)
    undisturbed = serve(policy, requests)
    engine = Engine(policy, plan=PLAN, drafters=[Uneven()])
    engine.submit(requests)
    verify, finished, num_calls = policy.verify_packed, {}, 0

    def breaks_at_times(*arguments):
        nonlocal num_calls
        num_calls += 1
        logits_NV = verify(*arguments)
        if num_calls % 3 == 0:
            raise torch.OutOfMemoryError("broken")
        return logits_NV

    policy.verify_packed = breaks_at_times
    while engine.num_requests:
        try:
            finished |= {each.request.request_id: each for each in engine.step().finished}
        except torch.OutOfMemoryError:
            engine.check_integrity()
    assert num_calls > 6
    assert_same_rollouts(undisturbed, finished, policy, at_most=0)


def test_where_packing_costs_more_than_it_saves_rows_are_padded():
    policy = random_policy()
    policy.least_saved_rows = 8 * K + 1
    requests = make_requests(prompts(8), SAMPLING)
    padded = serve(policy, requests, observers=[watch := Watch()])
    assert watch.num_packed == 0
    assert_same_rollouts(serve(packing_policy(), requests), padded, policy)
