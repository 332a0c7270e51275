"""A step waits for its device once, whatever its plan and law; and draws the same texts without a look."""

import pytest
import torch

from blockroll.kernels import transfer
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.drafters.engine import Engine
from blockroll.types import HISTORY, Law, Plan, Sampling
from tests import models
from tests.engines import make_requests, run
from tests.equality import assert_same_rollouts
from tests.recurrent_policy import RecurrentPolicy
from tests.waits import Waits

PLANS = {
    "plain": Plan(0),
    "two_forward": Plan(4),
    "fused": Plan(4, (0, 4)),
    "history": Plan(4, drafter=HISTORY),
}
OPTIONS = {
    "alone": {},
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.7, "draft_temperature": 0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.9},
    "repetition": {"repetition_penalty": 1.3},
    "bias": {"logit_bias": {5: 2.0}},
    "bad_words": {"bad_words_ids": ((5,), (6, 7))},
    "min_tokens": {"min_tokens": 30, "ignore_eos": False},
    "mixed": {"law": Law(0.5)},
    "mixed_and_edited": {"law": Law(0.5), "repetition_penalty": 1.1, "logit_bias": {5: -2.0}},
}
CELLS = [
    pytest.param(plan, options, id=f"{plan}-{options}")
    for plan in PLANS
    for options in OPTIONS
    if "law" not in OPTIONS[options] or plan in ("two_forward", "fused")
]
ALIKE = [(*(4, 5, 6, 7) * 2, 8 + index) for index in range(6)]  # a look into history finds something


def torch_policy(vocab_size: int = models.VOCAB_SIZE) -> HFPolicy:
    """One whose forwards are torch's own, with an adapter: compiled code is no way of a device."""
    model = models.random_model()
    if vocab_size != models.VOCAB_SIZE:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    del model.config.blockroll
    policy = HFPolicy(model, compile="off", prepack="off")
    policy.use_adapter(models.random_adapter(policy))
    return policy


@pytest.fixture(scope="module")
def policy():
    return torch_policy()


@pytest.fixture(scope="module")
def wide_policy():
    """Whose vocabulary is so large that laws are rows of logits."""
    return torch_policy(16_500)


@pytest.fixture
def device(monkeypatch):
    """This processor's memory is one that the host must wait for."""
    monkeypatch.setattr(transfer, "is_free", lambda device: False)


def waits_by_step(policy, plan, options, *, num_steps=2, prompts=ALIKE, **engine_options):
    engine = Engine(policy, plan=plan, max_batch_size=8, **engine_options)
    engine.submit(make_requests(prompts, Sampling(max_tokens=40, **{"ignore_eos": True, **options})))
    for _ in range(3):  # prefill, and what is sent once
        engine.step()
    steps = []
    for _ in range(num_steps):
        with Waits() as waits:
            engine.step()
        steps.append(waits)
    return steps


def assert_one_wait(waits):
    """One read, and what was sent went by `send`: for a tensor made of numbers a GPU is waited for."""
    assert waits.num_reads == 1, waits.reads
    assert all("from_numpy at kernels/transfer.py" in name for name in waits.sends), waits.sends


@pytest.mark.parametrize(("plan", "options"), CELLS)
def test_a_step_waits_once(device, policy, plan, options):
    for waits in waits_by_step(policy, PLANS[plan], OPTIONS[options]):
        assert_one_wait(waits)
        assert waits.num_sends <= 7, waits.sends


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("graphs", ["off", "buckets"])
def test_a_step_over_pages_waits_once(device, policy, plan, graphs):
    for waits in waits_by_step(policy, PLANS[plan], {}, num_steps=4, cache="pages", graphs=graphs):
        assert_one_wait(waits)


@pytest.mark.parametrize("plan", PLANS)
def test_a_step_with_recurrent_state_waits_once(device, plan):
    for waits in waits_by_step(RecurrentPolicy(), PLANS[plan], {}, num_steps=4):
        assert_one_wait(waits)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("options", ["alone", "top_p", "repetition"])
def test_a_step_waits_once_over_a_large_vocabulary(device, wide_policy, plan, options):
    for waits in waits_by_step(wide_policy, PLANS[plan], OPTIONS[options], num_steps=1, prompts=ALIKE[:2]):
        assert_one_wait(waits)


def test_a_packed_step_waits_once(device):
    policy = torch_policy()
    policy.least_saved_rows = 1
    packed = []
    verify = policy.verify_packed
    policy.verify_packed = lambda *arguments: packed.append(True) or verify(*arguments)
    prompts = [*ALIKE, (9,), (8, 9)]
    for options in ("alone", "top_p", "repetition", "bad_words"):
        for waits in waits_by_step(policy, PLANS["history"], OPTIONS[options], prompts=prompts):
            assert_one_wait(waits)
    assert packed


class NoFives:
    """A constraint that walks nowhere: its masks come from the host."""

    def start(self, vocab_size, tokenizer, end_token_ids):
        self.allowed_V = torch.arange(vocab_size) != 5
        return self

    def allowed(self, drafts, first):
        return self.allowed_V.expand(len(drafts) - first + 1, -1)

    def advance(self, token_ids):
        pass


@pytest.mark.parametrize(("plan", "most"), [("plain", 1), ("history", 2)])
def test_masks_of_a_constraint_are_sent_and_its_drafts_alone_waited_for(device, policy, plan, most):
    for waits in waits_by_step(policy, PLANS[plan], {"constraint": NoFives()}):
        assert waits.num_reads <= most, waits.reads


@pytest.mark.parametrize("plan", PLANS)
def test_one_read_more_anywhere_is_counted(device, policy, plan, monkeypatch):
    """In each forward that verifies."""
    name = "fused_rows" if plan == "fused" else "verify_logits"
    forward = getattr(policy, name)

    def reads(*arguments, **options):
        bool(policy.output_head.weight.sum() == 0)
        return forward(*arguments, **options)

    monkeypatch.setattr(policy, name, reads)
    assert [waits.num_reads for waits in waits_by_step(policy, PLANS[plan], {})] == [2, 2]


def repeated_by_a_tensor(numbers):
    return numbers.repeat_interleave(torch.ones_like(numbers).long())


def changed_where(numbers):
    numbers[numbers > 0.5] = 1.0


@pytest.mark.parametrize(
    "read",
    [
        torch.Tensor.tolist,
        torch.Tensor.cpu,
        torch.Tensor.numpy,
        torch.Tensor.nonzero,
        repeated_by_a_tensor,
        changed_where,
        lambda numbers: numbers[0].item(),
        lambda numbers: bool((numbers > 0).all()),
        lambda numbers: int(numbers[0]),
        lambda numbers: float(numbers[0]),
        lambda numbers: [0] * numbers[0].long(),
        lambda numbers: 0.5 in numbers,
        lambda numbers: numbers.to("cpu"),
        lambda numbers: numbers[numbers > 0.5],
        lambda numbers: numbers.masked_select(numbers > 0.5),
        lambda numbers: torch.where(numbers > 0.5),
        lambda numbers: numbers.unique(),
        lambda numbers: torch.equal(numbers, numbers),
        lambda numbers: torch.allclose(numbers, numbers),
        lambda numbers: torch.tensor([numbers[0], numbers[1]]),
        lambda numbers: torch.testing.assert_close(numbers, numbers),
        lambda numbers: f"{numbers[0]}",
        lambda numbers: torch.ops.aten._local_scalar_dense(numbers[0]),
    ],
)
def test_every_way_to_read_is_counted(read):
    numbers = torch.rand(8)
    with Waits() as waits:
        numbers * 2 + numbers.sum()
        torch.where(numbers > 0.5, numbers, 0.0).repeat_interleave(2)
        numbers.gather(0, numbers.argsort()).masked_fill(numbers > 0.5, 0.0)
    assert waits.num_reads == 0, waits.reads
    with Waits() as waits:
        read(numbers)
    assert waits.num_reads >= 1
    assert waits.num_reads == 1 or read not in (torch.Tensor.tolist, changed_where), waits.reads


def test_what_came_over_is_read_freely():
    with Waits() as waits:
        (numbers,) = transfer.fetch([torch.rand(3, 2, dtype=torch.float64)])
        numbers.tolist()
    assert waits.num_reads == 1


@pytest.mark.parametrize(("plan", "options"), CELLS)
def test_texts_do_not_depend_on_whether_numbers_are_looked_at(policy, plan, options, monkeypatch):
    options = {"ignore_eos": True, **OPTIONS[options]}
    sampling = Sampling(max_tokens=12, **{**options, "min_tokens": options.get("min_tokens", 0) // 4})
    requests = make_requests(ALIKE[:4], sampling)
    # Beside requests that nothing edits or cuts.
    requests[::2] = make_requests(ALIKE[:4], Sampling(max_tokens=12))[::2]
    looked_at = run(policy, requests, PLANS[plan])
    monkeypatch.setattr(transfer, "is_free", lambda device: False)
    assert_same_rollouts(looked_at, run(policy, requests, PLANS[plan]), policy)


@pytest.mark.parametrize("options", ["alone", "top_p", "top_k", "repetition", "mixed"])
def test_laws_over_a_large_vocabulary_do_not_either(wide_policy, options, monkeypatch):
    plan = PLANS["two_forward"]
    requests = make_requests(ALIKE[:2], Sampling(max_tokens=8, ignore_eos=True, **OPTIONS[options]))
    looked_at = run(wide_policy, requests, plan)
    monkeypatch.setattr(transfer, "is_free", lambda device: False)
    assert_same_rollouts(looked_at, run(wide_policy, requests, plan), wide_policy)


@pytest.mark.parametrize("plan", ["two_forward", "fused"])
@pytest.mark.parametrize("rows", ["draft", "verify"])
def test_what_is_not_finite_rides_along_and_fails_one_request(device, policy, plan, rows, monkeypatch):
    requests = make_requests(ALIKE[:3], Sampling(max_tokens=12, ignore_eos=True))
    undisturbed = run(policy, requests, PLANS[plan])
    name = "draft_logits" if rows == "draft" else "verify_logits" if plan == "two_forward" else "fused_rows"
    forward = getattr(policy, name)

    def spoiled(*arguments):
        monkeypatch.setattr(policy, name, forward)  # the first step alone
        given = forward(*arguments)
        with torch.inference_mode():
            logits = given.verify_logits_BLV if name == "fused_rows" else given
            logits[1, -1, 3] = torch.nan
        return given

    monkeypatch.setattr(policy, name, spoiled)
    served = run(policy, requests, PLANS[plan])
    assert served["r1"].finish_reason == "error"
    assert f"NonFiniteLogits: {rows} logits" in served["r1"].error
    assert served["r1"].token_ids == ()
    rest = {name: rollout for name, rollout in served.items() if name != "r1"}
    assert_same_rollouts({name: undisturbed[name] for name in rest}, rest, policy)
