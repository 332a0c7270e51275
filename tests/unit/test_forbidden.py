"""Tokens that must not follow: behind which tokens, and up to which length."""

import pytest
import torch

from blockroll.samplers.forbidden import Forbidden
from blockroll.samplers.text import Text
from blockroll.types import Sampling


@pytest.mark.parametrize(
    ("text", "sequences", "completed"),
    [
        ((1, 2), ((2, 3), (3,), (1, 2, 4), (9, 2, 5)), [3, 4]),
        ((8,), ((2, 3), (3,), (9, 8, 5)), [3]),
        ((2,), ((4, 2, 2, 2, 6),), []),
    ],
)
@pytest.mark.parametrize("num_between", [0, 1])
@pytest.mark.parametrize("num_prompt", [1, 2])
def test_what_would_complete_a_sequence_must_not_follow(text, sequences, completed, num_between, num_prompt):
    """Wherever its first tokens stand: in the prompt, in the completion, or among drafts."""
    first = len(text) - num_between
    own = Text(
        sampling=Sampling(bad_words_ids=sequences),
        prompt_ids=text[: min(num_prompt, first)],
        token_ids=[*text[min(num_prompt, first) : first]],
    )
    free = Text(sampling=Sampling(), prompt_ids=(1, 2), token_ids=[])
    between_BN = torch.tensor([text[first:]] * 2, dtype=torch.int64).view(2, num_between)
    rows_BLV = torch.zeros(2, num_between + 1, 10)
    Forbidden.of([own, free], torch.device("cpu")).mask(rows_BLV, between_BN)
    assert rows_BLV[0, -1].isneginf().nonzero().flatten().tolist() == completed
    assert (rows_BLV[1] == 0).all()


def test_no_end_may_follow_before_min_tokens():
    sampling = Sampling(min_tokens=4)
    text = Text(sampling=sampling, prompt_ids=(5,), token_ids=[6, 6], end_token_ids=frozenset({1, 3}))
    rows_1LV = torch.zeros(1, 4, 10, dtype=torch.float64)
    Forbidden.of([text], torch.device("cpu")).mask(rows_1LV, torch.tensor([[7, 7, 7]]))
    banned = [row.isneginf().nonzero().flatten().tolist() for row in rows_1LV[0]]
    assert banned == [[1, 3], [1, 3], [], []]


@pytest.mark.parametrize(
    ("text", "words", "left"), [((2,), ((2, 0), (2, 1), (2, 2)), [0, 1, 2]), ((2,), ((2, 0), (1,)), [2])]
)
def test_a_draft_row_that_would_be_empty_is_left_as_it_is(text, words, left):
    own = Text(sampling=Sampling(bad_words_ids=words), prompt_ids=text, token_ids=[])
    rows_11V = torch.zeros(1, 1, 3)
    no_tokens_10 = torch.empty((1, 0), dtype=torch.int64)
    Forbidden.of([own], torch.device("cpu")).mask_unless_empty(rows_11V, no_tokens_10)
    assert rows_11V.flatten().isfinite().nonzero().flatten().tolist() == left
