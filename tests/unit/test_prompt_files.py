"""One rule says what a prompt is: to `requests`, a file of prompts and a task."""

import json

import pytest

from blockroll.cli.prompts import prompts_from
from blockroll.errors import InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.policies.prompts import encode_prompt
from blockroll.rl_loops.prompts import load_prompts, read_prompts
from blockroll.rl_loops.tasks import from_rows
from blockroll.rollout.engine.requests import Limits
from blockroll.rollout.pool.prompted import make_requests
from blockroll.types import Sampling
from tests.runs import config_for, even_share, run

USER = {"role": "user", "content": "1+1=?"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
PROMPTS = [
    "1+1=?",
    [USER],
    [{"role": "user", "content": [{"type": "text", "text": "1+1=?"}]}],
    [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}],
    [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "2"}],
    [5, 6, 7],
]
NO_PROMPTS = [None, "", [], 3, True, [1.5], [True], [[1]], ["a"], USER, [USER, "a"]]
NO_PROMPTS += [[{"role": "user"}], [{"content": "a"}], [{"role": 1, "content": "a"}]]
TEMPLATE = "{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.tool_calls }}{% endfor %}"


@pytest.fixture
def chat_policy(policy_path):
    policy = HFPolicy.from_pretrained(policy_path, device="cpu")
    policy.tokenizer.chat_template = TEMPLATE
    policy.max_length = 10**6
    return policy


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
def test_a_prompt_is_the_same_to_requests_a_file_and_a_task(tmp_path, chat_policy, prompt, monkeypatch):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": prompt}))
    limits = Limits(vocab_size=chat_policy.vocab_size, max_length=10**6)
    (request,) = make_requests(chat_policy.tokenizer, limits, [prompt], Sampling(), seed=0, num_samples=1)
    assert load_prompts(str(path), chat_policy, {}).token_ids(0, 0) == request.prompt_ids
    assert prompts_from(path, chat_policy) == [request.prompt_ids]
    (row,) = from_rows(name="t", train=[{"prompt": prompt}], held_out=[], reward_fn=even_share).train_rows(
        0, 0, 1
    )
    assert encode_prompt(chat_policy.tokenizer, row["prompt"]) == request.prompt_ids


@pytest.mark.parametrize("prompt", NO_PROMPTS, ids=str)
def test_what_is_no_prompt_is_none_to_a_file_and_a_task(tmp_path, prompt):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": prompt}))
    with pytest.raises(InvalidInput, match=r"line 1 of .* has the prompt .*; expected an object like"):
        read_prompts(path)
    task = from_rows(name="t", train=[{"prompt": prompt}], held_out=[], reward_fn=even_share)
    with pytest.raises(InvalidInput, match="needs a 'prompt' that is text, token ids or messages"):
        task.train_rows(0, 0, 1)


def test_a_token_id_that_a_policy_does_not_have_is_found_before_a_conversion_starts(tmp_path, chat_policy):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": [5, 6]}\n{"prompt": [5, 1000000]}')
    with pytest.raises(InvalidInput, match=r"prompt 1 of .* holds token 1000000, outside the vocabulary"):
        load_prompts(str(path), chat_policy, {})


def test_a_run_trains_on_messages_and_token_ids(tmp_path, policy_path):
    policy = HFPolicy.from_pretrained(policy_path, device="cpu")
    policy.tokenizer.chat_template = TEMPLATE
    policy.save_pretrained(tmp_path / "chat")
    given, rows = [], [{"prompt": [5, 6]}, {"prompt": [{"role": "user", "content": "1"}]}]

    def noting(**arguments):
        given.extend(arguments["prompts"])
        return even_share(**arguments)

    task = from_rows(name="any", train=rows, held_out=rows, reward_fn=noting)
    run(config_for(tmp_path, tmp_path / "chat", plan="plain", steps=2, prompts_per_step=2), task=task)
    assert all(row["prompt"] in given for row in rows)
    assert "user" in (tmp_path / "run" / "report.html").read_text()
