"""Prompts as text, token ids or messages become the tokens that a policy goes on from."""

import logging

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from blockroll.errors import InvalidInput
from blockroll.policies.loading import load_tokenizer
from blockroll.policies.prompts import PromptEncoder, Room, as_prompts, encode_prompt, fit_prompts
from blockroll.rollout.engine.requests import Limits

TURNS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if not loop.last or add_generation_prompt %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER = {"role": "user", "content": "hi"}


def tokenizer(single="<s> $A", template=None):
    """The shipped byte tokenizer, with other special tokens around a text."""
    made = load_tokenizer("tiny")
    special = [(token, made.convert_tokens_to_ids(token)) for token in ("<s>", "</s>", "<mask>")]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    made.chat_template = template
    return made


def text_of(made, token_ids):
    return made.decode(token_ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("single", "text", "expected"),
    [
        ("<s> $A", "hi", "<s>hi"),
        ("<s> $A", "<s>hi", "<s>hi"),
        ("<s> $A </s>", "hi", "<s>hi"),
        ("<s> $A </s>", "<s>hi", "<s>hi"),
        ("$A </s>", "hi", "hi"),
        ("$A </s>", "<s>hi", "<s>hi"),
        ("<mask> <s> $A", "hi", "<mask><s>hi"),
        ("<mask> <s> $A", "<mask><s>hi", "<mask><s>hi"),
        ("<s> $A", "", "<s>"),
        ("<s> $A </s>", "<s>", "<s>"),
        ("<s> $A", "a", "<s>a"),
        ("<s> $A </s>", "turn</s>", "<s>turn</s>"),  # written by the user, so it is meant
    ],
)
def test_text_has_its_start_tokens_once_and_no_end_token_that_it_does_not_hold(single, text, expected):
    made = tokenizer(single)
    assert text_of(made, encode_prompt(made, text)) == expected


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "$A"])
def test_messages_are_what_the_template_writes_and_nothing_is_added(single):
    made = tokenizer(single, TURNS)
    assert text_of(made, encode_prompt(made, [USER])) == "<s>[user]hi</s>[assistant]"
    written = made.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert encode_prompt(made, written) == encode_prompt(made, [USER])


def test_a_last_message_of_the_assistant_is_gone_on_with():
    made = tokenizer(template=TURNS)
    messages = [USER, {"role": "assistant", "content": "Well"}]
    assert text_of(made, encode_prompt(made, messages)) == "<s>[user]hi</s>[assistant]Well"


def test_options_reach_the_chat_template():
    made = tokenizer(template="{% if thinking %}think{% endif %}{{ messages[0].content }}")
    assert text_of(made, encode_prompt(made, [USER], chat_template_kwargs={"thinking": True})) == "thinkhi"


@pytest.mark.parametrize("prompt", [[5, 6], (5, 6), [np.int64(5), np.int32(6)]])
def test_token_ids_are_taken_as_they_are(prompt):
    assert encode_prompt(None, prompt) == (5, 6)
    assert encode_prompt(tokenizer(), prompt) == (5, 6)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (b"hi", "bytes b'hi'; .* decode bytes to text first"),
        (USER, "dict .*; put a single message into a list"),
        ({"input_ids": [1]}, "dict .*; of an encoding give `input_ids`"),
        (7, "int 7; a prompt is text, a list of token ids, or a list of messages"),
        (None, "NoneType None; a prompt is"),
        (True, "bool True; a prompt is"),
        ([True, False], r"list \[True, False\]; a prompt is"),
        ([1.5], r"list \[1\.5\]; a prompt is"),
        (["hi", "ho"], r"list \['hi', 'ho'\]; a prompt is"),
        ([USER, "hi"], "list .*; a prompt is"),
        (torch.tensor([1, 2]), "Tensor .*; give `.tolist\\(\\)` of a tensor"),
        ([], "is empty; at least one token is needed"),
        ([{"content": "hi"}], "message 0 of row 3 is dict .* a message is a dict with a role and a content"),
        ([USER, {"role": "user"}], "message 1 of row 3"),
        ([{"role": "system", "content": "x"}], "the chat template refuses row 3: no system"),
    ],
)
def test_what_is_no_prompt_is_refused_by_name_and_with_advice(prompt, message):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    with pytest.raises(InvalidInput, match=f"(?s){message}"):
        encode_prompt(tokenizer(template=template), prompt, name="row 3")


@pytest.mark.parametrize("prompt", ["ab\ud800", [{"role": "user", "content": "\udcff"}]])
def test_half_a_surrogate_pair_is_no_text(prompt):
    with pytest.raises(
        InvalidInput, match=r"row 3 holds '\\ud[8c][0f][0f]' at character \d+: half of a surrogate"
    ):
        encode_prompt(tokenizer("<s> $A", template="{{ messages[0].content }}"), prompt, name="row 3")


def test_empty_text_needs_a_start_token():
    with pytest.raises(InvalidInput, match="is empty text, to which this tokenizer adds no start token"):
        encode_prompt(tokenizer("$A </s>"), "")


def test_messages_need_a_template_and_text_needs_a_tokenizer():
    with pytest.raises(InvalidInput, match=r"has no chat template: .* set tokenizer\.chat_template"):
        encode_prompt(tokenizer(), [USER])
    for prompt in ("hi", [USER]):
        with pytest.raises(
            InvalidInput, match="needs a tokenizer, and there is no tokenizer here: give token ids"
        ):
            encode_prompt(None, prompt)


@pytest.mark.parametrize(
    ("prompts", "number"),
    [
        ("hello", 1),
        ([USER, USER], 1),
        ([1, 2, 3], 1),
        (["hello", "you"], 2),
        ([[1, 2], [USER], "hi"], 3),
        ((text for text in ("a", "b")), 2),
        ([], 0),
    ],
)
def test_a_prompt_that_stands_alone_is_one_prompt(prompts, number):
    assert len(as_prompts(prompts)) == number


@pytest.mark.parametrize("prompts", [b"hi", USER, 7, None])
def test_what_holds_no_prompts_is_refused(prompts):
    with pytest.raises(InvalidInput, match="give one prompt or a list of them"):
        as_prompts(prompts)


LENGTHS = (3, 6, 5, 9)
PROMPTS = [tuple(range(length)) for length in LENGTHS]


def test_overlong_prompts_are_an_error_that_counts_them_and_names_the_longest():
    with pytest.raises(
        InvalidInput, match=r"2 of 4 prompts have more than 5 tokens, the longest is line 4 with 9; shorten"
    ):
        fit_prompts(PROMPTS, room=Room.of(6, ()), overlong="error", names=[f"line {n}" for n in range(1, 5)])


def test_overlong_prompts_are_skipped_or_cut_from_the_front_and_counted(caplog):
    with caplog.at_level(logging.WARNING):
        skipped = fit_prompts(PROMPTS, room=Room.of(6, ()), overlong="skip")
        cut = fit_prompts(PROMPTS, room=Room.of(6, ()), overlong="truncate")
    assert [number for number, _ in skipped] == [0, 2]
    assert [token_ids for _, token_ids in cut] == [PROMPTS[0], (1, 2, 3, 4, 5), PROMPTS[2], (4, 5, 6, 7, 8)]
    assert [record.message[:42] for record in caplog.records] == [
        "2 of 4 prompts have more than 5 tokens, th"
    ] * 2


@pytest.mark.parametrize("overlong", ["error", "skip", "truncate"])
def test_prompts_that_fit_stay_as_they_are_without_a_word(overlong, caplog):
    fitted = fit_prompts(PROMPTS, room=Room.of(10, ()), overlong=overlong)
    assert [token_ids for _, token_ids in fitted] == PROMPTS
    assert not caplog.records


def test_an_unknown_rule_or_no_room_is_refused():
    with pytest.raises(InvalidInput, match="overlong_prompts must be 'error', 'skip' or 'truncate'"):
        fit_prompts(PROMPTS, room=Room.of(10, ()), overlong="drop")
    with pytest.raises(InvalidInput, match="at least 1 must fit: lower max_tokens"):
        fit_prompts(PROMPTS, room=Room.of(8, (), free=8), overlong="skip")


@pytest.mark.parametrize("boundaries", [(), (24,), (8, 9, 24), (40,)])
@pytest.mark.parametrize("free", [1, 7])
def test_a_prompt_has_room_where_the_door_leaves_it_so_many_tokens(boundaries, free):
    """The boundary's own length too, behind which the factors of all positions would change."""
    limits = Limits(vocab_size=8, max_length=32, boundaries=boundaries)
    room = limits.prompt_room(free=free)
    for length in range(1, 40):
        fitting = [shorter for shorter in range(1, length + 1) if limits.room(shorter) >= free]
        assert room.fits(length) == (limits.room(length) >= free)
        assert room.kept(length) == max(fitting, default=0)


def test_a_prompt_as_long_as_a_boundary_falls_under_the_rule_for_long_ones(caplog):
    room, prompts = Room.of(32, (6,)), [tuple(range(length)) for length in (5, 6, 7, 32)]
    with pytest.raises(
        InvalidInput, match="2 of 4 prompts have 6 tokens or more than 31 tokens, the longest"
    ):
        fit_prompts(prompts, room=room, overlong="error")
    kept = fit_prompts(prompts, room=room, overlong="skip")
    assert [number for number, _ in kept] == [0, 2]
    cut = fit_prompts(prompts, room=room, overlong="truncate")
    assert [token_ids for _, token_ids in cut] == [prompts[0], prompts[1][1:], prompts[2], prompts[3][1:]]


def test_what_does_not_depend_on_a_prompt_is_found_out_once():
    made, asked = tokenizer("<s> $A </s>"), []

    class Counting:
        def __call__(self, text, **options):
            asked.append(text)
            return made(text, **options)

    encode = PromptEncoder(Counting())
    texts = [f"{index}+1" for index in range(50)]
    assert [encode(text) for text in texts] == [encode_prompt(made, text) for text in texts]
    assert [text for text in asked if text in texts] == texts  # each once
    assert len(asked) == 50 + 2


def test_a_token_outside_the_vocabulary_is_named_where_its_size_is_known():
    with pytest.raises(InvalidInput, match="line 3 holds token 99, outside the vocabulary of 50"):
        PromptEncoder(None, vocab_size=50)([1, 99], name="line 3")
    assert PromptEncoder(None)([1, 99]) == (1, 99)
