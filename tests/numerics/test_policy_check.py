"""The contract check: every family passes, planted faults fail the right check, and nothing is changed."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import blockroll
from blockroll.errors import InvalidInput
from blockroll.kernels.block_attention import RowLayout
from blockroll.policies import attention
from blockroll.policies.adapter import parent_hash
from blockroll.policies.hf import HFPolicy
from blockroll.policy_check.check import CheckResult, check_policy
from blockroll.rollout.engine.cache.slots import SlotWindow
from tests.models import FAMILIES, MASK_ID, VOCAB_SIZE, adapted_policy, random_model, random_policy

VERIFY = "verify rows equal the stock forward"
ALONE = "a batch row equals itself alone"
CHUNKED = "chunked prefill equals whole prefill"
CACHE = "the cache after partial accepts equals a recompute"
VOCABULARY = "vocabulary and end tokens fit"
FUSED = "fused verify rows equal the stock forward"
MASKS = "causal rows ignore what masks hold"
ANCHOR_KEYS = "the anchor's keys see no mask"
ANCHOR_LAW = "the anchor's law equals the stock forward"
BOTH_WAYS = "drafts look both ways"
PROPOSALS = "proposals equal fresh drafts"
EVERY_CHECK = [
    VERIFY, ALONE, CHUNKED, CACHE, VOCABULARY, FUSED, MASKS, ANCHOR_KEYS, ANCHOR_LAW, BOTH_WAYS, PROPOSALS,
]  # fmt: skip


def by_name(report) -> dict[str, CheckResult]:
    return {result.name: result for result in report.results}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [adapted_policy, random_policy])
def test_every_family_keeps_the_contract(make, family):
    report = check_policy(make(family))
    assert report.passed, str(report)
    assert list(by_name(report)) == EVERY_CHECK
    if "sliding_window" in FAMILIES[family]:
        assert "sliding window of 7 reached" in by_name(report)[VERIFY].detail


@pytest.mark.parametrize("num_drafts", [1, 2, 9])
def test_any_number_of_drafts_can_be_checked(num_drafts):
    report = check_policy(adapted_policy("gemma3_text"), num_drafts=num_drafts, seed=3)
    assert report.passed, str(report)


@pytest.mark.failure(90)
def test_a_model_that_magnifies_rounding_is_allowed_what_its_own_forward_shows(monkeypatch):
    """A sensitive head: no two stock kernels agree to 1e-4, yet a fault still stands out."""
    policy = adapted_policy(scale=300.0)
    allowed = by_name(check_policy(policy))[VERIFY].allowed
    assert 2e-4 < allowed < 2e-3
    assert check_policy(policy).passed
    real = RowLayout.positions

    def one_skipped(self, lengths_B):
        skipped_R = torch.arange(self.num_rows) > 2
        return real(self, lengths_B) + (0 if self.levels else skipped_R)

    monkeypatch.setattr(RowLayout, "positions", one_skipped)
    assert VERIFY in check_policy(policy).failures


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_half_precision_has_wider_bounds_and_says_so(family, dtype):
    policy = HFPolicy(random_model(family).to(dtype))
    report = check_policy(policy)
    assert report.passed, str(report)
    assert by_name(report)[VERIFY].allowed >= 0.25
    assert any(str(dtype).removeprefix("torch.") in sentence for sentence in report.not_checked)


def test_a_policy_that_cannot_draft_is_checked_for_what_it_does():
    model = random_model()
    del model.config.blockroll
    report = check_policy(HFPolicy(model))
    assert report.passed, str(report)
    assert list(by_name(report)) == EVERY_CHECK[:5]
    assert any(sentence.startswith("drafts and proposals") for sentence in report.not_checked)


def test_a_window_that_is_too_long_to_fill_is_said_to_be_unchecked():
    policy = random_policy("mistral")
    policy.model.config.sliding_window = policy._sliding_window = 4096
    report = check_policy(policy)
    assert report.passed, str(report)
    assert "sliding window of 4096 not reached" in by_name(report)[VERIFY].detail
    assert any("sliding window of 4096" in sentence for sentence in report.not_checked)


def everything(policy):
    """All that a check could change: weights, adapter, attention, hooks, mode and the global generator."""
    modules = list(policy.model.modules())
    return (
        parent_hash(policy.model),
        parent_hash(policy.adapter) if policy.adapter else None,
        policy.model.config._attn_implementation,
        [dict(module._forward_hooks) for module in modules],
        [module.training for module in modules],
        torch.get_rng_state().tolist(),
        {name: value for name, value in vars(policy).items() if name not in ("model", "adapter")},
        [(parameter.requires_grad, parameter.is_inference()) for parameter in policy.model.parameters()],
    )


@pytest.mark.parametrize("make", [adapted_policy, random_policy])
def test_nothing_of_the_policy_is_changed(make):
    policy = make("gemma2")
    before = everything(policy)
    check_policy(policy)
    assert everything(policy) == before


@pytest.mark.parametrize("make", [adapted_policy, random_policy])
@pytest.mark.parametrize("fails_at", range(0, 60, 6))
def test_a_check_that_raises_has_failed_and_leaves_nothing_changed(make, fails_at):
    """Some forward raises, be it stock, or between a change of the masks and its undoing."""
    policy = make()
    calls = 0

    def fail(module, inputs, output):
        nonlocal calls
        calls += 1
        if calls > fails_at:
            raise RuntimeError("planted")

    policy.model.base_model.register_forward_hook(fail)
    before = everything(policy)
    report = check_policy(policy)
    assert everything(policy) == before
    raised = [result for result in report.results if result.measured is None]
    assert raised
    assert raised == [result for result in report.results if not result.passed]
    assert all(result.detail == "RuntimeError: planted" for result in raised)


@pytest.fixture
def broken_attention(monkeypatch):
    """Policies made from now on attend by the function given."""

    def use(function):
        monkeypatch.setattr(attention, "attend", function)

    yield use
    monkeypatch.undo()
    attention.register()


def test_attention_that_ignores_the_mask_fails(broken_attention):
    real = attention.attend

    def causal_only(module, query, key, value, attention_mask, attended=None, **kwargs):
        return real(module, query, key, value, None, **kwargs)

    broken_attention(causal_only)
    assert {VERIFY, FUSED} <= set(check_policy(adapted_policy()).failures)


def test_a_horizon_off_by_one_fails(monkeypatch):
    real = RowLayout.mask

    def one_further(self, lengths_B, extent, **kwargs):
        return real(self, lengths_B, extent, **kwargs).roll(1, dims=-1)

    monkeypatch.setattr(RowLayout, "mask", one_further)
    assert {VERIFY, MASKS} <= set(check_policy(adapted_policy()).failures)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("window", [None, 6, 8])
def test_a_sliding_window_that_is_ignored_or_off_by_one_fails(family, window):
    policy = adapted_policy(family)
    policy._sliding_window = window
    assert {VERIFY, FUSED, ANCHOR_LAW} <= set(check_policy(policy).failures)


def is_two_forward(layout):
    return layout.levels == (layout.num_clean - 1,)


def test_an_anchor_that_sees_masks_fails(monkeypatch):
    real = RowLayout.mask

    def leaking(self, lengths_B, extent, **kwargs):
        mask = real(self, lengths_B, extent, **kwargs)
        return mask[:, :, -1:].expand_as(mask) if is_two_forward(self) else mask

    monkeypatch.setattr(RowLayout, "mask", leaking)
    failures = set(check_policy(adapted_policy()).failures)
    assert {ANCHOR_KEYS, ANCHOR_LAW, MASKS} <= failures
    assert not failures & {VERIFY, FUSED}


def test_columns_before_a_text_that_are_taken_for_its_tokens_fail(monkeypatch):
    """Whole texts of many lengths in one forward: the short ones have columns before their first token."""
    real = SlotWindow.__init__

    def from_zero(self, *arguments):
        real(self, *arguments)
        self.lengths_B = self.lengths_B.clamp(min=0)

    monkeypatch.setattr(SlotWindow, "__init__", from_zero)
    assert set(check_policy(adapted_policy()).failures) == {ANCHOR_LAW}


def test_drafts_that_look_back_only_fail(monkeypatch):
    real = RowLayout.mask

    def causal(self, lengths_B, extent, **kwargs):
        shown = RowLayout(num_clean=self.num_rows) if is_two_forward(self) else self
        return real(shown, lengths_B, extent, **kwargs)

    monkeypatch.setattr(RowLayout, "mask", causal)
    failures = set(check_policy(adapted_policy()).failures)
    assert failures == {BOTH_WAYS, PROPOSALS}


def test_an_adapter_that_acts_on_every_row_fails(monkeypatch):
    policy = adapted_policy()
    on_rows = policy.adapter.on_rows
    monkeypatch.setattr(policy.adapter, "on_rows", lambda first_row: on_rows(0))
    failures = set(check_policy(policy).failures)
    assert {MASKS, FUSED, ANCHOR_KEYS} <= failures
    assert VERIFY not in failures


def test_verify_logits_that_depend_on_the_mask_token_fail(monkeypatch):
    """As if masks were averaged over the batch: every row takes up a little of the mask's embedding."""
    policy = random_policy()

    def add_mask(module, inputs, output):
        return output + 1e-3 * module(torch.tensor(MASK_ID)) if inputs[0].dim() > 1 else None

    policy.model.get_input_embeddings().register_forward_hook(add_mask)
    assert MASKS in check_policy(policy).failures


def test_masks_that_are_not_what_drafts_are_made_from_fail(monkeypatch):
    policy = random_policy()
    monkeypatch.setattr(policy, "mask_token_id", VOCAB_SIZE - 1)
    forward_rows = policy.forward_rows

    def other_id(*args, **kwargs):
        policy.mask_token_id = MASK_ID
        try:
            return forward_rows(*args, **kwargs)
        finally:
            policy.mask_token_id = VOCAB_SIZE - 1

    monkeypatch.setattr(policy, "forward_rows", other_id)
    result = by_name(check_policy(policy))[MASKS]
    assert not result.passed
    assert "other masks changed no draft" in result.detail


@pytest.mark.parametrize("cap", ["attention", "final"])
def test_a_soft_cap_that_is_ignored_fails(broken_attention, cap):
    real = attention.attend
    if cap == "attention":
        broken_attention(lambda *args, softcap=None, **kwargs: real(*args, **kwargs))
    policy = adapted_policy("gemma2")
    if cap == "final":
        policy.final_softcap = None
    assert {VERIFY, FUSED} <= set(check_policy(policy).failures)


def test_positions_shifted_by_one_behind_a_prefix_fail(monkeypatch):
    real = RowLayout.positions

    def shifted(self, lengths_B):
        return real(self, lengths_B) + (lengths_B > 0)[:, None]

    monkeypatch.setattr(RowLayout, "positions", shifted)
    assert {VERIFY, CHUNKED, CACHE, FUSED} <= set(check_policy(adapted_policy()).failures)


def test_a_fused_proposal_on_wrong_positions_fails(monkeypatch):
    real = RowLayout.positions

    def shifted(self, lengths_B):
        is_mask_R = torch.arange(self.num_rows) >= self.num_clean
        return real(self, lengths_B) + (is_mask_R if len(self.levels) > 1 else 0)

    monkeypatch.setattr(RowLayout, "positions", shifted)
    assert check_policy(adapted_policy()).failures == (PROPOSALS,)


def test_rows_that_depend_on_their_batch_fail():
    policy = adapted_policy()
    policy.model.lm_head.register_forward_hook(lambda module, inputs, output: output * (1 + len(output) / 50))
    assert ALONE in check_policy(policy).failures


def test_non_finite_logits_fail():
    policy = adapted_policy()
    with torch.no_grad():
        policy.model.lm_head.weight[5] = torch.nan
    assert {VERIFY, ALONE, FUSED, ANCHOR_LAW, PROPOSALS} <= set(check_policy(policy).failures)


class TestVocabulary:
    """Logits may outnumber tokens, never the other way round, and something must end a rollout."""

    def result(self, policy):
        return by_name(check_policy(policy))[VOCABULARY]

    def tokenizer(self, size):
        from tokenizers import Tokenizer, models

        model = models.WordLevel({f"t{index}": index for index in range(size)}, unk_token="t0")
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))

    def test_padding_rows_are_allowed_and_reported(self):
        policy = HFPolicy(random_model(), self.tokenizer(20))
        result = self.result(policy)
        assert result.passed
        assert "24 logits for 20 tokens" in result.detail

    def test_tokens_without_logits_fail(self):
        result = self.result(HFPolicy(random_model(), self.tokenizer(30)))
        assert not result.passed
        assert result.measured == 6
        assert "resize the embeddings" in result.detail

    def test_no_end_token_fails(self):
        policy = random_policy()
        policy.eos_token_ids = ()
        result = self.result(policy)
        assert not result.passed
        assert "no rollout would ever end" in result.detail

    def test_an_end_token_out_of_range_fails(self):
        policy = random_policy()
        policy.eos_token_ids = (2, VOCAB_SIZE)
        assert self.result(policy).measured == 1


@pytest.mark.parametrize(("num_drafts", "advice"), [(0, "at least 1"), (48, "smaller num_drafts")])
def test_blocks_that_cannot_be_checked_are_refused(num_drafts, advice):
    with pytest.raises(InvalidInput, match=advice):
        check_policy(random_policy(), num_drafts=num_drafts)


def test_the_report_reads_as_text():
    policy = adapted_policy()
    policy.eos_token_ids = ()
    text = str(blockroll.check_policy(policy))
    assert text.startswith("Policy check of llama in float32 on cpu, blocks of 4 drafts")
    for name in EVERY_CHECK:
        assert name in text
    assert f"FAIL  {VOCABULARY}" in text
    assert f"ok    {VERIFY}" in text
    assert "not checked: texts longer than 22 tokens" in text
    assert text.endswith(f"1 of 11 checks failed ({VOCABULARY}). Do not train on its rollouts.")


def test_the_family_error_names_the_check():
    model = random_model()
    model.config.model_type = "opt"
    with pytest.raises(InvalidInput, match=r"'opt' is not supported.*`blockroll doctor --model`"):
        HFPolicy(model)
