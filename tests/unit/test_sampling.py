"""How a request is drawn is checked when it is said, by type as by range."""

import numpy as np
import pytest

from blockroll.errors import InvalidInput
from blockroll.types import Sampling


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 1.5}, "max_tokens must be a whole number, got 1.5"),
        ({"max_tokens": None}, "max_tokens must be a whole number, got None"),
        ({"max_tokens": True}, "max_tokens must be a whole number, got True"),
        ({"top_k": "5"}, "top_k must be a whole number, got '5'"),
        ({"temperature": "1"}, "temperature must be a number, got '1'"),
        ({"draft_temperature": "1"}, "draft_temperature must be a number or None, got '1'"),
        ({"min_tokens": 1.5}, "min_tokens must be a whole number, got 1.5"),
        ({"ignore_eos": "no"}, "ignore_eos must be True or False, got 'no'"),
        ({"stop": None}, "stop must be a string or a list of strings, got None"),
        ({"stop": (b"a",)}, "stop must be a string or a list of strings"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list of token ids, got 5"),
        ({"stop_token_ids": (1.5,)}, "stop_token_ids must be a list of token ids"),
        ({"bad_words_ids": (5,)}, "bad_words_ids must be a list of lists of token ids"),
        ({"bad_words_ids": (("a",),)}, "bad_words_ids must be a list of lists of token ids"),
        ({"logit_bias": [1.0]}, "logit_bias must be a dict of a number for each token id"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias must be a dict of a number for each token id"),
        ({"logits_processors": print}, "logits_processors must be a list of functions"),
        ({"law": "target"}, "law must be a Law"),
        ({"constraint": "[0-9]+"}, "constraint must be a Regex, a JsonSchema"),
    ],
)
def test_options_of_another_type_are_refused_before_a_step_meets_them(options, message):
    with pytest.raises(InvalidInput, match=message):
        Sampling(**options)


def test_one_stop_string_is_not_taken_apart_and_lists_are_as_good_as_tuples():
    assert Sampling(stop="ab").stop == ("ab",)
    listed = Sampling(stop=["ab"], stop_token_ids=[np.int64(3)], bad_words_ids=[[1, 2]])
    assert listed == Sampling(stop=("ab",), stop_token_ids=(3,), bad_words_ids=((1, 2),))
    assert hash(listed) == hash(Sampling(stop=("ab",), stop_token_ids=(3,), bad_words_ids=((1, 2),)))
