"""What a person types, on a tiny policy: the text and the files."""

import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from blockroll.cli import machine, runs
from blockroll.config import PolicyConfig, load_config
from blockroll.kernels.block_attention import RowLayout
from blockroll.policies.hf import HFPolicy
from blockroll.policies.loading import TINY_POLICY_DIR, load_tokenizer
from tests.command_line import blockroll
from tests.models import adapted_policy

pytestmark = pytest.mark.skipif(
    not (TINY_POLICY_DIR / "tokenizer.json").is_file(), reason="needs the shipped policy's tokenizer"
)


def test_help_names_every_command_and_loads_no_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from blockroll import cli; "
        "print(CliRunner().invoke(cli.app, ['--help']).output); assert 'torch' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert "..." not in shown.partition("Commands:")[2]
    for command in ("demo", "generate", "train", "bench", "report", "doctor"):
        assert command in shown


def test_generate_prints_the_same_text_for_the_same_seed_only(policy_path):
    def text(seed):
        result = blockroll("generate", "1+1=?", "--policy", policy_path, "--seed", seed, "--max-tokens", 16)
        assert result.exit_code == 0, result.output
        return result.stdout

    assert text(0) == text(0)
    assert text(0) != text(1)


def test_marks_only_add_brackets(policy_path):
    arguments = ("generate", "1+1=?", "--policy", policy_path, "--max-tokens", 24, "--temperature", 0)
    plain, marked = blockroll(*arguments), blockroll(*arguments, "--mark")

    legend, _, text = marked.stdout.partition("\n")
    assert "[brackets]" in legend
    unmarked = text.replace("[", "").replace("]", "")
    assert unmarked == plain.stdout.replace("[", "").replace("]", "")


def test_generate_keeps_to_a_regular_expression_and_a_schema(tmp_path):
    result = blockroll("generate", "1+1=?", "--regex", "(yes|no), [0-9]{3}", "--seed", 3)
    assert re.fullmatch("(yes|no), [0-9]{3}", result.stdout.splitlines()[0])
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}')
    result = blockroll("generate", "1+1=?", "--json-schema", schema, "--top-k", 20, "--min-p", 0.01)
    assert all(isinstance(item, bool) for item in json.loads(result.stdout.splitlines()[0]))


def test_generate_ends_with_its_counts(policy_path):
    arguments = ("generate", "1+1=?", "--policy", policy_path, "--max-tokens", 8)

    drafted = blockroll(*arguments, "--num-samples", 2)
    assert drafted.stderr.count("two_forward(4): ") == 2
    assert "acceptance" in drafted.stderr
    plain = blockroll(*arguments, "--plan", "plain")
    assert "plain: " in plain.stderr
    assert "1.00 tokens per forward" in plain.stderr
    assert "acceptance" not in plain.stderr


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_bench_writes_one_json_object_per_cell(policy_path, tmp_path, name):
    path = tmp_path / name
    result = blockroll(
        "bench", "--policy", policy_path, "--plans", "plain,two_forward", "--batch", "1,2", "--json", path,
        "--repeats", 1, "--rollouts", 2, "--max-tokens", 4, "--against", "generate",
    )  # fmt: skip
    assert result.exit_code == 0, result.output

    text = path.read_text()
    rows = [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)
    plans = ["plain", "two_forward(4)", "transformers_generate"]
    assert [(row["batch"], row["plan"]) for row in rows] == [
        (batch, plan) for batch in (1, 2) for plan in plans
    ]
    for row in rows:
        assert {"context", "tokens_per_s", "acceptance_rate", "tokens_per_forward"} <= row.keys()


def test_bench_judges_answers_and_draws_a_picture(policy_path, tmp_path):
    path, picture = tmp_path / "rows.json", tmp_path / "speed.png"
    result = blockroll(
        "bench", "--policy", policy_path, "--plans", "plain,two_forward(2)", "--mix-weight", "1,0.5",
        "--batch", "2", "--temperature", "0.5,1", "--max-tokens", "4", "--repeats", 1, "--rollouts", 2,
        "--task", "arithmetic", "--samples", 2, "--pass-k", 2, "--json", path, "--picture", picture,
    )  # fmt: skip
    assert result.exit_code == 0, result.output

    rows = json.loads(path.read_text())
    assert len(rows) == 2 * 3
    assert all(0 <= row["pass_at_1"] <= row["pass_at_k"] <= 1 for row in rows)
    assert "pass@2" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_train_reads_yaml_and_overrides_and_reports_and_refuses_its_own_folder(
    policy_path, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        f"name: short\npolicy: {{path: {policy_path}}}\n"
        "rollout: {backend: local, num_replicas: 1, max_tokens: 8}\n"
        "train: {steps: 5, prompts_per_step: 2, group_size: 2, eval_every: 0, learner_threads: 1}\n"
    )
    first = blockroll("train", "run.yaml", "train.steps=1")
    assert first.exit_code == 0, first.output
    assert re.search(r"^short 1/1 reward .* tok/s$", first.stdout, re.MULTILINE)  # no bar in a pipe
    assert len((tmp_path / "runs/short/metrics.jsonl").read_text().splitlines()) == 1

    again = blockroll("train", "run.yaml", "train.steps=1")
    assert again.exit_code == 2
    assert "--resume runs/short" in again.stderr

    resumed = blockroll("train", "--resume", "runs/short", "train.steps=2")
    assert resumed.exit_code == 0, resumed.output
    assert len((tmp_path / "runs/short/metrics.jsonl").read_text().splitlines()) == 2

    (tmp_path / "runs/short/report.html").unlink()
    assert blockroll("report", "runs/short").exit_code == 0
    assert (tmp_path / "runs/short/report.html").is_file()


def test_demo_runs_twice_measures_speed_and_does_without_ray(policy_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        runs,
        "DEMO",
        dataclasses.replace(
            runs.DEMO,
            policy=PolicyConfig(path=policy_path),
            rollout=dataclasses.replace(runs.DEMO.rollout, max_tokens=4),
            train=dataclasses.replace(
                runs.DEMO.train, prompts_per_step=2, group_size=2, eval_prompts=2, learner_threads=1
            ),
        ),
    )
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(runs, "find_spec", lambda name: None if name == "ray" else find_spec(name))

    first = blockroll("demo", "--steps", 1)
    assert first.exit_code == 0, first.output
    assert "Ray is not installed" in first.output
    rows = json.loads((tmp_path / "runs/demo/speed.json").read_text())
    assert {row["plan"] for row in rows} == {"plain", "two_forward(4)"}
    assert "Report: runs/demo/report.html" in first.output

    second = blockroll("demo", "--steps", 1, "--backend", "local")
    assert second.exit_code == 0, second.output
    assert "Replacing the earlier runs/demo" in second.output


def test_demo_deletes_nothing_that_is_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/demo").mkdir(parents=True)
    (tmp_path / "runs/demo/thesis.tex").write_text("years of work")

    result = blockroll("demo", "--backend", "local")

    assert result.exit_code == 2
    assert "is not the folder of a run" in result.stderr
    assert (tmp_path / "runs/demo/thesis.tex").is_file()


def test_doctor_says_versions_and_what_is_missing(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name == "trl" else find_spec(name))

    result = blockroll("doctor")

    for word in ("device", "torch", "transformers", "cores", "OMP_NUM_THREADS", "without trl", "tiny policy"):
        assert word in result.stdout
    assert result.exit_code == (0 if "tiny policy: generates" in result.stdout else 1)


def test_doctor_shows_the_evidence_of_a_checkpoint_that_keeps_the_contract(policy_path):
    result = blockroll("doctor", "--model", policy_path)

    assert result.exit_code == 0, result.output
    for words in ("llama in float32", "verify rows equal the stock forward", "proposals equal fresh drafts"):
        assert words in result.stdout
    assert "FAILED" not in result.stdout
    assert "not checked: texts longer than" in result.stdout
    assert "The policy keeps the contract: all 11 checks passed." in result.stdout


def test_doctor_shows_what_plans_cost_and_how_layers_are_run(policy_path):
    result = blockroll("doctor", "--model", policy_path, "--json")
    assert result.exit_code == 0, result.output
    planner = json.loads(result.stdout)["planner"]
    measured = {(each["batch_size"], each["plan"]): each["plain_steps"] for each in planner["plans"]}
    assert {"history(1)", "history(16)", "two_forward(4)"} <= {plan for _, plan in measured}
    assert {batch_size for batch_size, _ in measured} == {1, 8, 32}
    assert all(cost >= 1 for (_, plan), cost in measured.items() if plan.startswith("history"))
    assert planner["packed"].startswith("linear weights are not packed: none is large enough")
    assert planner["compiled"].startswith("layers are not compiled: there is no C compiler")
    shown = blockroll("doctor", "--model", policy_path).stdout
    for words in (
        "plans of auto, in float32",
        "pays from",
        "accepted",
        "plain where none pays",
        "not packed",
    ):
        assert words in shown


def test_doctor_checks_a_checkpoint_with_an_adapter_from_elsewhere_and_without_a_tokenizer(tmp_path):
    policy = adapted_policy("qwen3")
    policy.model.save_pretrained(tmp_path / "policy")
    policy.adapter.save_pretrained(tmp_path / "adapter")

    plain = blockroll("doctor", "--model", tmp_path / "policy")
    assert plain.exit_code == 0, plain.output
    assert "all 5 checks passed" in plain.stdout
    assert "neither a draft adapter nor a mask token" in plain.stdout
    assert "loaded without one" in plain.stdout

    drafting = blockroll("doctor", "--model", tmp_path / "policy", "--adapter", tmp_path / "adapter")
    assert drafting.exit_code == 0, drafting.output
    assert "all 11 checks passed" in drafting.stdout


def test_doctor_fails_a_checkpoint_whose_tokenizer_has_more_tokens_than_it_has_logits(policy_path, tmp_path):
    shutil.copytree(policy_path, tmp_path / "policy")
    tokenizer = load_tokenizer(policy_path)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(tmp_path / "policy")

    result = blockroll("doctor", "--model", tmp_path / "policy")

    assert result.exit_code == 1
    assert result.stdout.count("FAILED") == 1
    assert "1 of 11 checks failed (vocabulary and end tokens fit). Do not train on its" in result.stdout
    assert "Traceback" not in result.output


def test_doctor_fails_a_policy_that_decodes_another_law(policy_path, monkeypatch):
    positions = RowLayout.positions

    def shifted(self, lengths_B):
        return positions(self, lengths_B) + (0 if self.levels else torch.arange(self.num_rows))

    monkeypatch.setattr(RowLayout, "positions", shifted)
    result = blockroll("doctor", "--model", policy_path)

    assert result.exit_code == 1
    assert "verify rows equal the stock forward;" in result.stdout
    assert "Do not train on its rollouts." in result.stdout


@pytest.mark.parametrize("module", ["blockroll", "blockroll.cli"])
def test_the_package_and_its_command_line_run_as_modules(module):
    shown = subprocess.run(
        [sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", shown.stdout)


def test_generate_prints_json_that_holds_every_token_with_both_log_probabilities(policy_path):
    arguments = ("generate", "1+1=?", "--policy", policy_path, "--max-tokens", 12, "--num-samples", 2)
    result = blockroll(*arguments, "--json", "--top-k", 5, "--presence-penalty", 0.5)
    assert result.exit_code == 0, result.output
    samples = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(samples) == 2
    for sample in samples:
        assert sample["plan"] == "two_forward(4)"
        assert sample["law"] == "target"
        count = len(sample["token_ids"])
        assert len(sample["policy_logprobs"]) == len(sample["behavior_logprobs"]) == count
        assert all(value <= 0 for value in sample["behavior_logprobs"])
    shown = blockroll(*arguments, "--top-k", 5, "--presence-penalty", 0.5).stdout
    assert [sample["text"] for sample in samples] == [
        text.rstrip("\n") for text in re.split(r"--- sample \d\n", shown)[1:]
    ]


def test_generate_frames_a_message_by_the_chat_template(policy_path, tmp_path):
    tokenizer = load_tokenizer(policy_path)
    tokenizer.chat_template = "{% for m in messages %}({{ m['content'] }}){% endfor %}"
    shutil.copytree(policy_path, tmp_path / "chatty")
    tokenizer.save_pretrained(tmp_path / "chatty")
    result = blockroll(
        "generate", "1+1", "--policy", tmp_path / "chatty", "--chat", "--json", "--max-tokens", 2
    )
    assert result.exit_code == 0, result.output
    assert tokenizer.decode(json.loads(result.stdout)["prompt_ids"]).endswith("(1+1)")


def test_bench_measures_the_prompts_of_a_file(policy_path, tmp_path):
    (tmp_path / "own.jsonl").write_text('{"prompt": "1+1=?"}\n{"prompt": "12+30=?"}\n')
    (tmp_path / "own.txt").write_text("1+1=?\n12+30=?\n")
    rows = []
    for name in ("own.jsonl", "own.txt"):
        path = tmp_path / f"{name}.json"
        result = blockroll(
            "bench", "--policy", policy_path, "--plans", "plain", "--batch", "2", "--json", path,
            "--repeats", 1, "--rollouts", 2, "--max-tokens", 4, "--prompts", tmp_path / name,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        rows += json.loads(path.read_text())
    assert len({row["context"] for row in rows}) == 1


def test_doctor_prints_json_of_a_machine_and_of_a_check(policy_path):
    result = blockroll("doctor", "--model", policy_path, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["passed"]
    assert found["tiny_policy"]["works"]
    assert found["versions"]["torch"]
    assert len(found["check"]["checks"]) == 11
    memory = found["memory"]
    assert memory["cache"] == memory["cache_rows"] * memory["keys_and_values_of_a_token"] > 0
    assert memory["weights"] >= sum(memory["stored"].values()) > 0
    assert all(check["measured"] is not None for check in found["check"]["checks"])


def test_doctor_reaches_what_the_prompts_of_a_file_reach(tmp_path):
    window = 600  # past what doctor fills with random prompts of its own
    torch.manual_seed(0)
    tokenizer = load_tokenizer("tiny")
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=window,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    HFPolicy(MistralForCausalLM(config), tokenizer).save_pretrained(tmp_path / "sliding")
    (tmp_path / "long.txt").write_text("1+" * 400 + "\n" + "2+2=?\n")
    short = blockroll("doctor", "--model", tmp_path / "sliding", "--json")
    long = blockroll("doctor", "--model", tmp_path / "sliding", "--prompts", tmp_path / "long.txt", "--json")
    assert short.exit_code == long.exit_code == 0, long.output
    assert f"sliding window of {window} not reached" in short.stdout
    assert f"sliding window of {window} reached" in long.stdout
    assert "attention beyond the sliding window" in short.stdout
    assert "attention beyond the sliding window" not in long.stdout


def test_show_config_prints_what_a_file_and_its_overrides_resolve_to(tmp_path):
    (tmp_path / "run.yaml").write_text("train: {steps: 7}\n")
    result = blockroll("train", tmp_path / "run.yaml", "rollout.plan=auto", "--show-config")
    assert result.exit_code == 0, result.output
    (tmp_path / "shown.yaml").write_text(result.stdout)
    assert load_config(tmp_path / "shown.yaml") == load_config(tmp_path / "run.yaml", ["rollout.plan=auto"])


def test_generate_drafts_from_history_by_a_policy_that_never_learned_to(policy_path):
    arguments = (
        "generate",
        "1+1=?",
        "--policy",
        policy_path,
        "--max-tokens",
        40,
        "--temperature",
        0,
        "--json",
    )
    plain, drafted = (
        json.loads(blockroll(*arguments, "--plan", plan).stdout) for plan in ("plain", "history(8)")
    )
    assert drafted["plan"] == "history(8)"
    assert drafted["token_ids"] == plain["token_ids"]
    assert 0 < drafted["num_accepted"] <= drafted["num_drafted"]
