"""Where a text ends: at the same token as if the whole of it were decoded for every token."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from blockroll.rollout.engine.ends import StopRule

EURO = "\N{EURO SIGN}".encode()


def byte_level():
    """One token per byte, and some of several; a special token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("ab", "c"), ("\u0120", "a")]
    vocab = {piece: i for i, piece in enumerate([*letters, "ab", "abc", "\u0120a"])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=made)


def byte_fallback():
    """As sentencepiece: pieces that begin with a space, which the first one loses, and single bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581a", "a", "b", "\u2581ab"]
    made = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made)


def word_pieces():
    """Pieces that are written together, and marks that swallow the space before them."""
    pieces = ["[UNK]", "a", "b", "##a", "##b", ".", ",", "don", "'", "t"]
    made = Tokenizer(models.WordPiece(vocab={p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    made.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(tokenizer_object=made)


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback(), "word pieces": word_pieces()}


def decoding(tokenizer):
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))


def rule_of(tokenizer, *stop: str) -> StopRule:
    return StopRule(stop_token_ids=frozenset(), stop=stop, max_tokens=10**6, decode=decoding(tokenizer))


def ends_at(rule: StopRule, token_ids, *, most: int, rng: random.Random) -> int | None:
    """Tokens kept of a text that comes in blocks of up to `most` tokens."""
    committed: list[int] = []
    while len(committed) < len(token_ids):
        block = token_ids[len(committed) : len(committed) + rng.randint(1, most)]
        kept, reason = rule.cut(committed, block)
        committed += block[:kept]
        if reason is not None:
            return len(committed)
    return None


def ends_by_whole_text(tokenizer, stop, token_ids) -> int | None:
    decode = decoding(tokenizer)
    for count in range(1, len(token_ids) + 1):
        if any(each in decode(token_ids[:count]) for each in stop):
            return count
    return None


STOPS = {
    "byte level": [("abcab",), ("\N{EURO SIGN}a",), (" a a", "zzz"), ("<|end|>",), ("b<|end|>a",)],
    "byte fallback": [("a b a b",), ("\N{EURO SIGN}",), ("b\N{EURO SIGN} a",), (" a ab", "bbbb")],
    "word pieces": [("a. b",), ("abba",), ("don't a",), (" , b",)],
}
CASES = [(name, stop) for name, stops in STOPS.items() for stop in stops]


def random_text(tokenizer, rng: random.Random, length: int) -> list[int]:
    """Of few different tokens, characters in pieces and broken ones among them."""
    size = len(tokenizer)
    if size < 20:
        return [rng.randrange(1, size) for _ in range(length)]
    if "<0xE2>" in tokenizer.get_vocab():
        euro = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in EURO]
        pieces = [[i] for i in range(257, size)] + [euro, euro, euro[:2], euro[1:]]
    else:
        euro = tokenizer("\N{EURO SIGN}")["input_ids"]
        words = [tokenizer(word)["input_ids"] for word in ("a", "b", " a", "abc", "z", "<|end|>")]
        pieces = [*words, *words, euro, euro[:1], euro[1:], euro[:2]]
    text: list[int] = []
    while len(text) < length:
        text += rng.choice(pieces)
    return text


@pytest.mark.parametrize(("name", "stop"), CASES, ids=str)
def test_a_text_ends_where_its_whole_decoding_first_holds_the_string(name, stop):
    tokenizer, rng = TOKENIZERS[name], random.Random(f"{name} {stop}")
    for _ in range(8):
        text = random_text(tokenizer, rng, 160)
        stretch = decoding(tokenizer)(text)[-40:][: rng.randint(4, 12)]
        for strings in (stop, (stretch,)):
            want = ends_by_whole_text(tokenizer, strings, text)
            assert strings == stop or want is not None
            for most in (1, 5):
                assert ends_at(rule_of(tokenizer, *strings), text, most=most, rng=rng) == want


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_stop_strings_and_stop_tokens_complete_within_min_tokens_is_text(name):
    tokenizer, rng = TOKENIZERS[name], random.Random(name)
    decode, held_back = decoding(tokenizer), 0
    for _ in range(8):
        text = random_text(tokenizer, rng, 160)
        stop, stop_id, min_tokens = decode(text)[20:22], rng.choice(text), rng.randint(0, 120)
        ends = [
            count
            for count in range(1, len(text) + 1)
            if text[count - 1] == stop_id
            or decode(text[:count]).rfind(stop) > decode(text[: count - 1]).rfind(stop)
        ]
        want = next((count for count in ends if count > min_tokens), None)
        held_back += ends[0] != want
        for most in (1, 5):
            rule = StopRule(
                stop_token_ids=frozenset({stop_id}),
                stop=(stop,),
                max_tokens=10**6,
                decode=decode,
                min_tokens=min_tokens,
            )
            assert ends_at(rule, text, most=most, rng=rng) == want
    assert held_back


def test_a_string_of_many_tokens_is_found_far_into_a_text():
    tokenizer, stop = TOKENIZERS["byte level"], "z" * 60 + "\N{EURO SIGN}"
    text = tokenizer("ab" * 400 + "z" * 59 + "b" + "a" * 77 + stop + "ab")["input_ids"]
    want = ends_by_whole_text(tokenizer, (stop,), text)
    assert want == len(text) - 1
    assert ends_at(rule_of(tokenizer, stop), text, most=3, rng=random.Random(0)) == want


@pytest.mark.parametrize("token", ["a", "\N{EURO SIGN}", "broken"])
def test_the_tokens_decoded_for_stop_strings_grow_with_the_text_and_not_with_its_square(token):
    tokenizer, decoded = TOKENIZERS["byte level"], 0
    ids = tokenizer("\N{EURO SIGN}" if token == "broken" else token)["input_ids"]
    ids = ids[:1] if token == "broken" else ids

    def decode(token_ids):
        nonlocal decoded
        decoded += len(token_ids)
        return decoding(tokenizer)(token_ids)

    counts = []
    for length in (1000, 4000):
        rule = StopRule(stop_token_ids=frozenset(), stop=("ZZZZ",), max_tokens=10**6, decode=decode)
        committed: list[int] = []
        decoded = 0
        while len(committed) < length:
            rule.cut(committed, ids)
            committed += ids
        counts.append(decoded)
    assert counts[1] < 4.5 * counts[0]


def test_a_step_that_is_repeated_with_other_tokens_forgets_the_first():
    rule = rule_of(TOKENIZERS["byte level"], "abb")
    a, b, z = (TOKENIZERS["byte level"](letter)["input_ids"][0] for letter in "abz")
    committed = [z] * 100
    assert rule.cut(committed, [a, b]) == (2, None)
    assert rule.cut(committed, [b]) == (1, None)
    assert rule.cut([*committed, b], [a, b, b, z]) == (3, "stop")
