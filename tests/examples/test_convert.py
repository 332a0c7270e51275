"""`blockroll convert` from outside: what it writes, how it stops, resumes and refuses."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from blockroll import cli
from blockroll.config import ConvertConfig, DraftConfig, PolicyConfig
from blockroll.errors import CheckpointError, ConfigError, InvalidInput, RunExists
from blockroll.policies.adapter import read_adapter_config
from blockroll.policies.hf import HFPolicy
from blockroll.policies.loading import load_tokenizer
from blockroll.rl_loops import convert as module
from blockroll.rl_loops.convert import STATE_FILE, convert, load_convert_config
from blockroll.rl_loops.prompts import load_prompts, read_prompts
from blockroll.types import Plan, Sampling
from tests.engines import causal_logprobs, make_requests, run
from tests.equality import assert_same_rollouts, assert_same_rows, assert_same_weights
from tests.models import prompts

SMALL = {
    "max_tokens": 400,
    "prompts_per_round": 6,
    "completion_tokens": 16,
    "steps_per_round": 2,
    "max_batch_size": 6,
}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"


@pytest.fixture
def bare_path(tmp_path):
    """The shipped policy's causal part: its weights, and not a word of drafting."""
    folder = tmp_path / "bare"
    policy = HFPolicy.from_pretrained("tiny")
    del policy.model.config.blockroll
    policy.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(bare_path, tmp_path):
    return ConvertConfig(
        out=str(tmp_path / "adapter"),
        policy=PolicyConfig(path=bare_path),
        draft=DraftConfig(rank=4, block_sizes=(4,)),
        **SMALL,
    )


def test_a_conversion_leaves_an_adapter_that_drafts_and_weights_that_have_not_moved(config, bare_path):
    result = convert(config)
    assert result.num_tokens >= 400
    assert "400" in result.stop_reason
    assert {row["layout"] for row in result.metrics} == {"two_forward", "fused"}
    assert all(len(row["acceptance_K"]) == 4 for row in result.metrics)
    bare = HFPolicy.from_pretrained(bare_path)
    policy = HFPolicy.from_pretrained(bare_path, adapter=config.out)
    described = read_adapter_config(result.out)
    assert described.block_sizes == (4,)
    assert described.layouts == ("two_forward", "fused")
    assert described.trained_tokens >= 400
    assert described.parent_hash
    assert policy.trained_drafts == 4
    for name, tensor in bare.model.state_dict().items():
        assert torch.equal(tensor, policy.model.state_dict()[name])
    requests = make_requests(prompts(6), Sampling(max_tokens=12, temperature=0))
    plain = run(bare, requests, Plan(0))
    for plan in (Plan(4), Plan(4, (0, 4))):
        drafted = run(policy, requests, plan)
        assert_same_rollouts(plain, drafted, policy)


@pytest.mark.slow
def test_a_conversion_that_was_interrupted_between_rounds_goes_on_as_if_it_had_not_been(config, tmp_path):
    whole = convert(config)
    first = dataclasses.replace(config, out=str(tmp_path / "parts"), max_tokens=150)
    convert(first)
    again = dataclasses.replace(load_convert_config(first.out), max_tokens=400)
    # The learning rate follows the budget, so the budget of the whole is what both halves must have had.
    resumed = convert(again, resume=True)
    assert resumed.num_tokens == whole.num_tokens
    assert len(resumed.metrics) == len(whole.metrics)
    assert [row["round"] for row in resumed.metrics] == [row["round"] for row in whole.metrics]
    assert_same_rows(whole.metrics[0], resumed.metrics[0])


@pytest.mark.slow
def test_a_resumed_conversion_equals_the_uninterrupted_one(config, tmp_path, monkeypatch):

    whole = convert(config)
    broken = dataclasses.replace(config, out=str(tmp_path / "broken"))
    save = module._save

    def save_and_die(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_save", save_and_die)
    for resume in (False, True):
        with pytest.raises(SystemExit):
            convert(broken, resume=resume)
    monkeypatch.setattr(module, "_save", save)
    resumed = convert(load_convert_config(broken.out), resume=True)
    assert_same_rows(whole.metrics, resumed.metrics)
    want, got = (torch.load(result.out / STATE_FILE, weights_only=True) for result in (whole, resumed))
    assert_same_weights(want["trainer"]["weights"], got["trainer"]["weights"])


def test_a_full_conversion_saves_a_policy_that_drafts_by_its_mask_token(bare_path, tmp_path):
    policy = HFPolicy.from_pretrained(bare_path)
    config = ConvertConfig(
        out=str(tmp_path / "full"),
        draft=DraftConfig(conversion="full", block_sizes=(4,), layouts=("two_forward",)),
        **SMALL,
    )
    convert(config, policy=policy)
    loaded = HFPolicy.from_pretrained(config.out)
    assert loaded.adapter is None
    assert (loaded.trained_drafts, loaded.trained_layouts) == (4, ("two_forward",))
    assert loaded.mask_token_id == policy.tokenizer.mask_token_id


@pytest.mark.slow
def test_a_full_conversion_learns_from_the_policy_it_began_with(bare_path, tmp_path, monkeypatch):
    """Answers of the weights in training would leave its law to drift. A resumed conversion does so too."""
    policy, original = HFPolicy.from_pretrained(bare_path), HFPolicy.from_pretrained(bare_path)
    round_of, rounds = module._round, []

    def checked(trainer, rollouts, config):
        gaps = []
        for rollout in rollouts:
            answered, trained = (causal_logprobs(each, rollout) for each in (original, trainer.policy))
            want = torch.tensor(rollout.policy_logprobs).double()
            torch.testing.assert_close(answered, want, atol=1e-4, rtol=0)
            gaps.append(float((answered - trained).abs().max()))
        rounds.append(max(gaps))
        return round_of(trainer, rollouts, config)

    monkeypatch.setattr(module, "_round", checked)
    draft = DraftConfig(conversion="full", block_sizes=(4,), layouts=("two_forward",), learning_rate=1e-2)
    config = ConvertConfig(out=str(tmp_path / "full"), draft=draft, **SMALL)
    result = convert(config, policy=policy)
    assert rounds[0] == 0
    assert min(rounds[1:]) > 1e-3
    distances = [row["policy_kl"] for row in result.metrics]
    assert distances[0] == pytest.approx(0, abs=1e-5)
    assert max(distances) > 1e-3
    more = dataclasses.replace(config, max_tokens=2 * config.max_tokens)
    rounds.clear()
    convert(more, resume=True, policy=HFPolicy.from_pretrained(bare_path))
    assert min(rounds) > 1e-3


def test_a_full_conversion_refuses_greedy_answers():
    draft = DraftConfig(conversion="full")
    with pytest.raises(ConfigError, match="best token alone; give a temperature above 0"):
        ConvertConfig(out="unused", draft=draft, temperature=0)


def test_it_stops_when_acceptance_stops_rising(config):
    idle = dataclasses.replace(
        config, max_tokens=10**6, patience=2, draft=DraftConfig(rank=2, block_sizes=(4,), learning_rate=0.0)
    )
    result = convert(dataclasses.replace(idle, min_gain=5.0))
    assert "acceptance stopped rising" in result.stop_reason
    assert max(row["round"] for row in result.metrics) == 2 * idle.patience


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_finished_rounds_and_says_how_to_go_on(config, stop):
    code = (
        "import json, sys; from blockroll.rl_loops.convert import convert; "
        "from blockroll.config import ConvertConfig, from_mapping; "
        "convert(from_mapping(ConvertConfig, json.loads(sys.argv[1])))"
    )
    values = dataclasses.asdict(dataclasses.replace(config, max_tokens=10**7))
    child = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(values)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    state = os.path.join(config.out, STATE_FILE)
    while not os.path.exists(state) and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.2)
    os.killpg(child.pid, stop)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 128 + stop, output
    assert f"blockroll convert --resume {config.out}" in output.replace("\n", "")
    assert read_adapter_config(Path(config.out)).trained_tokens > 0


def test_the_command_writes_an_adapter_and_takes_overrides(bare_path, tmp_path):
    arguments = ["convert", "--policy", bare_path, "--out", tmp_path / "a", "--max-tokens", 100]
    overrides = ["draft.rank=2", "draft.block_sizes=[2,4]", "prompts_per_round=4", "completion_tokens=12"]
    result = CliRunner().invoke(cli.app, [str(word) for word in (*arguments, *overrides)])
    assert result.exit_code == 0, result.output
    assert "trainable parameters" in result.output
    assert "acceptance by position" in result.output
    assert read_adapter_config(tmp_path / "a").block_sizes == (2, 4)
    again = CliRunner().invoke(cli.app, [str(word) for word in arguments])
    assert isinstance(again.exception, RunExists) or again.exit_code != 0


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("{not json", "line 2 of .* is not JSON"),
        ("[1, 2]", "line 2 of .* has the prompt None"),
        ('{"prompt": ""}', "line 2 of .* has the prompt ''"),
        ('{"text": "hello"}', 'expected an object like {"prompt": "text"}'),
        ('{"prompt": [{"role": "user"}]}', "line 2 of"),
    ],
)
def test_a_bad_line_of_the_prompts_file_is_named(tmp_path, line, advice):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(InvalidInput, match=advice):
        read_prompts(path)


def test_prompts_are_text_as_it_is_or_messages_through_the_template(tmp_path):
    policy = HFPolicy.from_pretrained("tiny")
    path = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "1+1=?"}]
    path.write_text(json.dumps({"prompt": messages}) + "\n" + json.dumps({"prompt": "2+2=?"}) + "\n")
    with pytest.raises(InvalidInput, match="no chat template"):
        load_prompts(str(path), policy, {})
    policy.tokenizer.chat_template = TEMPLATE
    prompts = load_prompts(str(path), policy, {"colour": "blue"})
    texts = {policy.tokenizer.decode(prompts.token_ids(0, index)) for index in range(6)}
    assert texts == {"user:1+1=?\n", "<s>2+2=?"}  # as the tokenizer begins a text
    assert prompts.chat_template_hash
    assert prompts.chat_template_kwargs == {"colour": "blue"}
    assert [prompts.token_ids(5, index) for index in range(9)] == [
        prompts.token_ids(5, index) for index in range(9)
    ]
    with pytest.raises(InvalidInput, match="no prompts file"):
        load_prompts(str(tmp_path / "none.jsonl"), policy, {})


def test_prompts_that_the_context_cannot_hold_are_left_out_before_a_conversion_starts(tmp_path, caplog):
    policy = HFPolicy.from_pretrained("tiny")
    policy.max_length = 16
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("1+1=?", "1" * 15, "2+2=?")))
    prompts = load_prompts(str(path), policy, {})
    assert {len(prompts.token_ids(0, index)) for index in range(6)} == {6}
    assert "1 of 3 prompts have more than 15 tokens" in caplog.text
    path.write_text(json.dumps({"prompt": "1" * 15}) + "\n")
    with pytest.raises(InvalidInput, match=r"every prompt of .* is longer than the context of 16 tokens"):
        load_prompts(str(path), policy, {})


def test_an_adapter_used_with_another_chat_template_says_so(config, bare_path, tmp_path):
    tokenizer = load_tokenizer(bare_path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(bare_path)
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": [{"role": "user", "content": "1+1=?"}]}) + "\n")
    convert(dataclasses.replace(config, prompts=str(path), max_tokens=50))
    HFPolicy.from_pretrained(bare_path, adapter=config.out)
    tokenizer.chat_template = TEMPLATE + "!"
    tokenizer.save_pretrained(bare_path)
    with pytest.warns(UserWarning, match="another chat template"):
        HFPolicy.from_pretrained(bare_path, adapter=config.out)


def test_what_cannot_be_resumed_is_named(config, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no convert\.json"):
        load_convert_config(tmp_path)
    convert(config)
    with pytest.raises(RunExists, match="--resume"):
        convert(config)
    (tmp_path / "adapter" / STATE_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"has lost its convert_state\.pt"):
        convert(config, resume=True)
