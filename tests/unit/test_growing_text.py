"""The text that `generate` streams: all of it, in pieces, at a cost that does not grow with its length."""

import random

import pytest

from blockroll.cli.texts import GrowingText
from blockroll.policies.loading import load_tokenizer

TOKENIZER = load_tokenizer("tiny")  # a token for every byte
PIECES = ["a", "\N{EURO SIGN}", "\N{GRINNING FACE}", " ", "\n", "x y"]


@pytest.mark.parametrize("most", [1, 5])
def test_the_pieces_of_a_growing_text_are_the_text_however_its_tokens_come(most):
    rng = random.Random(most)
    text = "".join(rng.choice(PIECES) for _ in range(400))
    token_ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    growing, pieces, start = GrowingText(TOKENIZER.decode), [], 0
    while start < len(token_ids):
        stop = start + rng.randint(1, most)
        pieces.append(growing.add(token_ids[start:stop]))
        start = stop
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def test_the_tokens_decoded_for_a_growing_text_grow_with_it_and_not_with_its_square():
    counts = []
    for length in (500, 2000):
        lengths: list[int] = []

        def decode(token_ids, lengths=lengths):
            lengths.append(len(token_ids))
            return TOKENIZER.decode(token_ids)

        growing = GrowingText(decode)
        for token_id in TOKENIZER("ab" * (length // 2), add_special_tokens=False)["input_ids"]:
            growing.add([token_id])
        counts.append(sum(lengths))
    assert counts[1] < 4.5 * counts[0]
