"""A pool takes prompts as text, token ids and messages, and answers a conversation with text."""

import pytest

from blockroll import RolloutPool, Sampling
from blockroll.errors import InvalidInput
from blockroll.policies.loading import load_model, load_tokenizer, resolve_checkpoint

USER = {"role": "user", "content": "1+1=?"}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}"
    "{% if add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    load_model(resolve_checkpoint("tiny"), device="cpu").save_pretrained(folder)
    with RolloutPool.from_pretrained(str(folder), plan="plain", max_length=64) as made:
        yield made


def test_text_ids_and_messages_of_one_prompt_give_the_same_rollout(pool):
    ids = [pool.tokenizer.bos_token_id, *pool.tokenizer("1+1=?\n", add_special_tokens=False)["input_ids"]]
    kinds = ["1+1=?\n", "<s>1+1=?\n", ids, tuple(ids), [USER]]
    made = [pool.requests(kind, Sampling(max_tokens=8), seed=3) for kind in kinds]
    assert all(requests == made[0] for requests in made)
    together = pool.requests(kinds, Sampling(max_tokens=8), num_samples=2)
    assert [request.request_id for request in together[:3]] == ["0-0-0", "0-0-1", "0-1-0"]
    assert {request.prompt_ids for request in together} == {tuple(ids)}


def test_chat_returns_as_many_answers_as_asked_for_and_requests_give_the_same(pool):
    sampling = Sampling(max_tokens=8)
    answers = pool.chat([USER], sampling, seed=5, num_samples=3)
    requests = pool.requests([USER], sampling, seed=5, num_samples=3)
    rollouts = {rollout.request.request_id: rollout for rollout in pool.generate(requests)}
    assert answers == [pool.decode(rollouts[request.request_id]) for request in requests]
    assert all(isinstance(answer, str) for answer in answers)


def test_chat_goes_on_with_a_last_message_of_the_assistant(pool):
    messages = [USER, {"role": "assistant", "content": "\n1+1"}]
    (request,) = pool.requests([messages])
    assert pool.tokenizer.decode(request.prompt_ids) == "<s>1+1=?\n1+1"
    assert len(pool.chat(messages, Sampling(max_tokens=4))) == 1


@pytest.mark.parametrize("messages", ["hi", [], [[USER], [USER]], USER, [1, 2]])
def test_chat_refuses_what_is_not_one_conversation(pool, messages):
    with pytest.raises(InvalidInput, match="a conversation is a list of messages"):
        pool.chat(messages)


def test_a_long_prompt_is_refused_before_anything_runs_or_handled_by_the_rule_asked_for(pool):
    prompts = ["a" * 20, "b" * 70, "c" * 30]
    sampling = Sampling(max_tokens=34)
    with pytest.raises(InvalidInput, match="'0-1-0' has 71 tokens, but the context holds 64"):
        pool.generate(pool.requests(prompts, sampling))
    skipped = pool.requests(prompts, sampling, overlong_prompts="skip")
    assert [request.request_id for request in skipped] == ["0-0-0"]  # the last leaves 33 tokens
    cut = pool.requests(prompts, sampling, overlong_prompts="truncate")
    assert [len(request.prompt_ids) for request in cut] == [21, 30, 30]
    assert skipped[0] == cut[0]
    assert len(list(pool.generate(cut))) == 3


def test_no_samples_and_no_tokens_are_refused_and_no_prompts_are_no_requests(pool):
    with pytest.raises(InvalidInput, match="num_samples must be a whole number, at least 1, got 0"):
        pool.requests("hi", num_samples=0)
    with pytest.raises(InvalidInput, match="prompt 1 is empty"):
        pool.requests(["hi", []])
    assert pool.requests([]) == []


@pytest.mark.parametrize("given", ["hi", ["hi"], [5, 6], None, 7])
def test_what_is_no_request_is_refused_with_the_way_to_make_one(pool, given):
    with pytest.raises(InvalidInput, match=r"generate takes a list of requests, got .* `requests\("):
        pool.generate(given)
    with pytest.raises(InvalidInput, match="generate takes a list of requests, got Request "):
        pool.generate(pool.requests("hi")[0])


@pytest.mark.parametrize("num_samples", [1.5, "2", True, None])
def test_samples_are_counted_in_whole_numbers_and_drawn_by_a_sampling(pool, num_samples):
    with pytest.raises(InvalidInput, match="num_samples must be a whole number, at least 1, got "):
        pool.requests("hi", num_samples=num_samples)
    with pytest.raises(InvalidInput, match=r"sampling must be a Sampling, as Sampling\("):
        pool.requests("hi", {"max_tokens": 4})


def test_decode_leaves_special_tokens_out_unless_asked(pool):
    (rollout,) = pool.generate(pool.requests("1+1=?\n", Sampling(temperature=0.0, max_tokens=40)))
    assert rollout.finish_reason == "stop"
    assert pool.decode(rollout) + "</s>" == pool.decode(rollout, skip_special_tokens=False)
