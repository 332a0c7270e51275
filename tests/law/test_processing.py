"""Processors, truncation and constraints under blocks: the exact law, through whole engine steps, on tables.

What the law must be is written twice: in `blockroll.samplers`, and in numpy in `engine_law.Processing`, one
token at a time. Whole requests with every draft history must commit by the second.
"""

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import NoRepeatNGramLogitsProcessor

from blockroll.kernels.rows import logit_rows, truncation
from blockroll.samplers import text as text_module
from blockroll.samplers.forbidden import Forbidden
from blockroll.types import Plan
from tests.law.engine_law import PROMPT, Processing, engine_law, processed_law
from tests.law.integrate import Toy, max_difference, target_law
from tests.law.toys import TOYS
from tests.params import slow_beyond

PLANS = [Plan(0), Plan(2), Plan(2, (0,)), Plan(2, (0, 2)), Plan(2, (0, 1, 2))]
# Under every processing the plan of most paths is left to the slow tests; one of fewer levels is not.
EACH_PLAN = [*PLANS[:-1], pytest.param(PLANS[-1], marks=pytest.mark.slow)]
LENGTH = 3


@dataclass(frozen=True)
class ByRemainder:
    """A constraint as a table: what a token may be depends on the sum of all before."""

    num_tokens: int

    def forbidden(self, completion) -> set[int]:
        return {(sum(completion) + len(completion)) % self.num_tokens}

    def start(self, vocab_size, tokenizer, end_token_ids):
        return _ByRemainderGuide(self)


class _ByRemainderGuide:
    def __init__(self, constraint: ByRemainder) -> None:
        self.constraint, self.completion = constraint, ()

    def allowed(self, drafts, first):
        rows = []
        for n in range(len(drafts) + 1):
            forbidden = self.constraint.forbidden((*self.completion, *drafts[:n]))
            if n >= first:
                rows.append([token not in forbidden for token in range(self.constraint.num_tokens)])
            if n < len(drafts) and drafts[n] in forbidden:
                break
        return torch.tensor(rows)

    def advance(self, token_ids):
        for token in token_ids:
            assert token not in self.constraint.forbidden(self.completion), "a constraint must hold"
            self.completion += (token,)


def completing(*sequences):
    """What would complete one of the sequences behind prompt and completion."""

    def excluded(completion):
        text = (PROMPT, *completion)
        return {
            s[-1] for s in sequences if len(s) <= len(text) + 1 and text[len(text) + 1 - len(s) :] == s[:-1]
        }

    return excluded


def repeating_trigrams(completion):
    text = (PROMPT, *completion)
    seen = {text[i : i + 3] for i in range(len(text) - 2)}
    return {trigram[2] for trigram in seen if trigram[:2] == text[-2:]}


BAD_WORDS = ((1, 2), (2, 2, 0), (PROMPT, 1))
REMAINDER = ByRemainder(3)
PROCESSINGS = {
    "top_k": Processing(options={"top_k": 2}),
    "top_p": Processing(options={"top_p": 0.618}),
    "min_p": Processing(options={"min_p": 0.41}),
    "top_k_then_top_p": Processing(options={"top_k": 2, "top_p": 0.618}),
    "repetition": Processing(options={"repetition_penalty": 1.7}),
    "presence_and_frequency": Processing(options={"presence_penalty": 0.4, "frequency_penalty": 0.9}),
    "bias": Processing(options={"logit_bias": {1: 1.3, 2: -0.4}}),
    "banned_token": Processing(options={"logit_bias": {2: -math.inf}}, excluded=lambda _: {2}),
    "min_tokens": Processing(options={"min_tokens": 11, "stop_token_ids": (1,)}, excluded=lambda _: {1}),
    "bad_words": Processing(options={"bad_words_ids": BAD_WORDS}, excluded=completing(*BAD_WORDS)),
    "constraint": Processing(options={"constraint": REMAINDER}, excluded=REMAINDER.forbidden),
    "all": Processing(
        options={
            "top_p": 0.9137,
            "repetition_penalty": 1.2,
            "presence_penalty": 0.3,
            "frequency_penalty": -0.2,
            "logit_bias": {0: 0.7},
            "constraint": REMAINDER,
        },
        excluded=REMAINDER.forbidden,
    ),
}


@pytest.mark.parametrize("plan", EACH_PLAN, ids=lambda plan: plan.name)
@pytest.mark.parametrize("toy", ["hot", "greedy"])
@pytest.mark.parametrize("name", PROCESSINGS)
def test_every_processor_sees_the_prefix_a_position_really_has(plan, toy, name):
    law, _ = engine_law(TOYS[toy], plan, length=LENGTH, processing=PROCESSINGS[name])
    assert max_difference(law, processed_law(TOYS[toy], PROCESSINGS[name], LENGTH)) < 1e-12


@pytest.fixture(params=["float64", "float32", "compiled"])
def large(request, monkeypatch):
    """Tables are held as rows of a large vocabulary are: logits, of which a row at a time is judged.

    Gives by how much the law may differ from that of the logits in float64.
    """
    monkeypatch.setattr(logit_rows, "_TILE", 0)
    monkeypatch.setattr(truncation, "_FEW", 0)
    if request.param == "float64":
        return 1e-12
    monkeypatch.setattr(logit_rows, "_WIDE", 0)
    if request.param == "float32":
        monkeypatch.setattr(logit_rows, "rows_library", lambda: None)
    return 1e-6


@pytest.mark.parametrize("plan", [PLANS[1], PLANS[3]], ids=lambda plan: plan.name)
@pytest.mark.parametrize("name", slow_beyond(2, ["top_p", "min_p", "all", "top_k", "top_k_then_top_p"]))
def test_rows_of_a_large_vocabulary_have_the_same_law(large, plan, name):
    law, _ = engine_law(TOYS["hot"], plan, length=2, processing=PROCESSINGS[name])
    assert max_difference(law, processed_law(TOYS["hot"], PROCESSINGS[name], 2)) < large


@pytest.mark.parametrize("plan", [PLANS[1], PLANS[3]], ids=lambda plan: plan.name)
@pytest.mark.parametrize("name", slow_beyond(1, ["repetition", "nothing"]))
def test_mixed_rows_of_a_large_vocabulary_are_corrected_by_pi_over_mu(large, plan, name):
    toy, processing = TOYS["hot"], PROCESSINGS.get(name, Processing())
    law, corrected = engine_law(toy, plan, length=2, weight=0.5, processing=processing)
    assert max_difference(corrected, target_law(toy, 2)) < large
    assert max_difference(law, target_law(toy, 2)) > 1e-2


@pytest.mark.parametrize(
    "plan",
    [pytest.param(plan, marks=[pytest.mark.slow] if len(plan.levels) > 1 else []) for plan in PLANS],
    ids=lambda plan: plan.name,
)
def test_a_processor_of_transformers_holds_at_every_position(plan):
    """Drafts are not edited by it: they are drawn from their own law and verified."""
    processor = NoRepeatNGramLogitsProcessor(3)
    processing = Processing(options={"logits_processors": (processor,)}, excluded=repeating_trigrams)
    with_masked_drafts = Processing(options=processing.options)
    law, _ = engine_law(
        TOYS["stochastic"], plan, length=4, processing=_Undrafted(processing, with_masked_drafts)
    )
    assert max_difference(law, processed_law(TOYS["stochastic"], processing, 4)) < 1e-12


class _Undrafted:
    """Targets by one processing, drafts by another."""

    def __init__(self, target: Processing, draft: Processing) -> None:
        self.options, self.target_V, self.draft_V = target.options, target.target_V, draft.draft_V


@pytest.mark.parametrize("plan", EACH_PLAN[1:], ids=lambda plan: plan.name)
@pytest.mark.parametrize("name", ["repetition", "presence_and_frequency", "bias"])
@pytest.mark.parametrize("weight", slow_beyond(1, [0.5, 1.0]))
def test_pi_over_mu_corrects_what_keeps_every_token(plan, name, weight):
    """Penalties and biases leave full support, so that the product of pi/mu gives the policy's own law."""
    toy = TOYS["hot"]
    law, corrected = engine_law(toy, plan, length=LENGTH, weight=weight, processing=PROCESSINGS[name])
    assert max_difference(corrected, target_law(toy, LENGTH)) < 1e-12
    assert max_difference(law, target_law(toy, LENGTH)) > 1e-2


@pytest.mark.failure(20)
@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "bad_words", "constraint"])
def test_under_truncation_the_weights_sum_to_the_mass_that_is_left(name):
    toy = TOYS["stochastic"]
    processing = PROCESSINGS[name]
    _, corrected = engine_law(toy, Plan(2), length=LENGTH, processing=processing)
    reachable = processed_law(toy, processing, LENGTH)
    left = {tokens: p for tokens, p in target_law(toy, LENGTH).items() if tokens in reachable}
    assert max_difference(corrected, left) < 1e-12
    assert sum(left.values()) < 0.95


def forbids_behind_the_last_row_only(forbidden, rows_BLV, between_BN):
    forbid(forbidden, rows_BLV[:, -1:], between_BN)


def counts_no_drafts(ids_BU, between_BN, num_rows):
    return torch.zeros(len(ids_BU), num_rows, ids_BU.shape[1]).double()


forbid = Forbidden.mask


@pytest.mark.failure(38)
@pytest.mark.parametrize(
    ("module", "attribute", "bug", "name"),
    [
        (Forbidden, "mask", forbids_behind_the_last_row_only, "bad_words"),
        (text_module, "added_by_row", counts_no_drafts, "presence_and_frequency"),
        (text_module, "added_by_row", counts_no_drafts, "repetition"),
    ],
)
def test_a_processor_that_reaches_the_extra_token_alone_breaks_the_law(
    monkeypatch, module, attribute, bug, name
):
    """vLLM once applied min_p and logit_bias to the bonus token only (failure 38)."""
    monkeypatch.setattr(module, attribute, bug)
    law, _ = engine_law(TOYS["stochastic"], Plan(2, (0, 2)), length=LENGTH, processing=PROCESSINGS[name])
    assert max_difference(law, processed_law(TOYS["stochastic"], PROCESSINGS[name], LENGTH)) > 1e-3


FEWER_TOKENS = {"top_k", "top_p", "min_p", "bad_words_ids", "constraint", "min_tokens"}


@st.composite
def _cases(draw):
    """A random table, K up to 4 where two tokens keep the cells few, and any options together."""
    vocab_size = draw(st.sampled_from([2, 3]))
    num_drafts = draw(st.integers(0, 4 if vocab_size == 2 else 2))
    row = st.lists(st.integers(1, 9), min_size=vocab_size, max_size=vocab_size)
    target, drafts = draw(st.lists(row, min_size=7, max_size=7)), draw(st.lists(row, min_size=5, max_size=5))
    levels = draw(st.sampled_from([(), (0,), (0, num_drafts), tuple(range(num_drafts + 1))]))
    plan = Plan(num_drafts, tuple(sorted(set(levels))) if num_drafts else ())
    what = draw(st.sampled_from(["nothing", "bad_words", "constraint", "min_tokens"]))
    remainder = ByRemainder(vocab_size)
    word = draw(st.tuples(st.integers(0, vocab_size - 1), st.integers(0, vocab_size - 1)))
    masked = {
        "nothing": Processing(),
        "bad_words": Processing(options={"bad_words_ids": (word,)}, excluded=completing(word)),
        "constraint": Processing(options={"constraint": remainder}, excluded=remainder.forbidden),
        "min_tokens": PROCESSINGS["min_tokens"],
    }[what]
    share = st.floats(0.05, 0.95).map(lambda value: value + 1e-4 * math.pi)  # no edge of small integers
    options = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "top_k": st.integers(1, vocab_size),
                "top_p": share,
                "min_p": share,
                "repetition_penalty": st.floats(0.5, 2),
                "presence_penalty": st.floats(-1, 1),
                "frequency_penalty": st.floats(-1, 1),
                "logit_bias": st.dictionaries(st.integers(0, vocab_size - 1), st.floats(-2, 2)),
            },
        )
    )
    toy = Toy(
        vocab_size=vocab_size,
        target_weights=lambda history: target[(2 * sum(history) + len(history)) % 7],
        draft_weights=lambda history, i: drafts[(sum(history) + len(history) + i) % 5],
        temperature=draw(st.sampled_from([0.5, 1.0, 1.7])),
        draft_temperature=draw(st.sampled_from([0.0, 1.0])),
    )
    weight = draw(st.sampled_from([1.0, 1.0, 0.5]))
    return toy, plan, dataclasses.replace(masked, options={**masked.options, **options}), weight


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(case=_cases())
def test_whatever_the_tables_and_the_options(case):
    toy, plan, processing, weight = case
    law, corrected = engine_law(toy, plan, length=2, weight=weight, processing=processing)
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    options = processing.options
    if weight == 1:
        assert max_difference(law, processed_law(toy, processing, 2)) < 1e-12
    elif not FEWER_TOKENS & options.keys():
        assert max_difference(corrected, target_law(toy, 2)) < 1e-12
