"""Whatever is wrong with what a person typed: one line that says what would be right, and the exit code."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest

from blockroll import cli
from blockroll.cli.examples import EXAMPLES, epilog
from blockroll.errors import WeightSyncError
from blockroll.policies.loading import TINY_POLICY_DIR
from tests.command_line import blockroll, save_random_policy

pytestmark = pytest.mark.skipif(
    not (TINY_POLICY_DIR / "tokenizer.json").is_file(), reason="needs the shipped policy's tokenizer"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, policy_path):
    """A working folder with good and broken files; POLICY is a checkpoint that drafts, PLAIN one without."""
    here = tmp_path_factory.mktemp("wrong")
    shutil.copytree(policy_path, here / "POLICY")
    save_random_policy(here / "PLAIN", can_draft=False)
    for name in ("nojson", "otherfamily", "notokenizer", "badtokenizer", "noweights", "cutweights"):
        shutil.copytree(policy_path, here / name)
    (here / "nojson/config.json").write_text("{")
    (here / "otherfamily/config.json").write_text('{"model_type": "gpt2"}')
    for path in (here / "notokenizer").glob("tokenizer*"):
        path.unlink()
    (here / "badtokenizer/tokenizer.json").write_text("nope")
    (here / "noweights/model.safetensors").unlink()
    weights = here / "cutweights/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    files = {
        "good.yaml": "policy: {path: PLAIN}\nrollout: {backend: local, num_replicas: 1, plan: plain}\n",
        "broken.yaml": "train: [1",
        "list.yaml": "- 1\n",
        "tab.yaml": "train:\n\tsteps: 1\n",
        "twice.yaml": "seed: 1\nseed: 2\n",
        "empty.txt": "\n",
        "one.txt": "1+1=?\n",
        "two.txt": "1+1=?\n1+2=?\n",
        "broken.jsonl": "{nope\n",
        "chat.jsonl": json.dumps({"prompt": [{"role": "user", "content": "hi"}]}),
        "long.txt": "1+" * 3000,
        "schema.json": "{",
        "task_without.py": "x = 1\n",
        "task_raises.py": "def task():\n    raise RuntimeError('boom')\n",
        "task_unreadable.py": "def (\n",
    }
    for name, text in files.items():
        (here / name).write_text(text)
    (here / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    (here / "latin.txt").write_bytes(b"caf\xe9\n")
    (here / "runs/broken").mkdir(parents=True)
    (here / "runs/broken/config.yaml").write_text("seed: [\n")
    (here / "runs/begun").mkdir()
    (here / "runs/begun/config.yaml").write_text("seed: 1\n")
    (here / "folder").mkdir()
    return here


WRONG = r"""
generate hi --device foo                             | none that torch knows
generate hi --device cuda:7                          | is not here
generate hi --device meta                            | is not here
generate hi --policy nowhere                         | give a folder with config.json
generate hi --policy nojson                          | config.json of the checkpoint in nojson
generate hi --policy otherfamily                     | 'gpt2' is not supported
generate hi --policy notokenizer                     | the tokenizer of the checkpoint in notokenizer
generate hi --policy badtokenizer                    | the tokenizer of the checkpoint in badtokenizer
generate hi --policy noweights                       | the weights of the checkpoint in noweights
generate hi --policy cutweights                      | the weights of the checkpoint in cutweights
generate hi --policy good.yaml                       | give a folder with config.json
generate hi --adapter folder                         | no draft adapter in folder
generate hi --plan wild                              | 'two_forward'
generate hi --plan ''                                | 'two_forward'
generate hi --policy POLICY --plan two_forward(0)    | at least 1
generate hi --policy POLICY --plan fused(4,[1])      | must rise from 0
generate hi --policy POLICY --plan two_forward(9999) | at most 256 tokens a step
generate hi --policy POLICY --plan two_forward(128)  | give K of at most 127
generate hi --policy POLICY --plan fused(200)        | give K of at most 127
generate hi --policy PLAIN --plan fused              | make an adapter
generate hi --chat                                   | no chat template
generate hi --temperature -1                         | 0 means greedy
generate hi --temperature nan                        | at least 0
generate hi --max-tokens 0                           | max_tokens must be at least 1
generate hi --top-p 0                                | top_p must be above 0
generate hi --top-k x                                | valid integer
generate hi --num-samples 0                          | --num-samples
generate hi --threads 100000                         | --threads
generate hi --regex a(                               | regular expression 'a(' cannot be used
generate hi --regex a --json-schema schema.json      | not both
generate hi --json-schema schema.json                | must be JSON
generate hi --json-schema nowhere                    | cannot be read
generate hi --json-schema latin.txt                  | cannot be read
generate XXXXXX --policy POLICY                      | the context holds 128
generate                                             | Missing argument
generate hi --max-new-tokens 4                       | here it is --max-tokens
generate hi --n 4                                    | here it is --num-samples
generate hi -n 4                                     | here it is --num-samples
generate hi --model POLICY                           | here it is --policy
generate hi --logprobs                               | --json prints them
generate hi --do-sample                              | --temperature 0 is greedy
generate hi --tempreature 1                          | did you mean --temperature?
bench --bogus                                        | blockroll bench has no option --bogus
bench --policy POLICY --plans plain,wild             | 'two_forward'
bench --policy POLICY --plans plain,two_forward(128) | give K of at most 127
bench --plans plain,plain                            | each plan is measured once
bench --batch 1,x                                    | whole numbers
bench --batch 0                                      | at least 1
bench --repeats 0                                    | at least 1
bench --mix-weight 1,2                               | between 0 and 1
bench --temperature warm                             | --temperature takes numbers
bench --prompts random                               | give prompt_tokens
bench --prompts nowhere.jsonl                        | there is no such file
bench --prompts folder                               | there is no such file
bench --prompts empty.txt                            | holds no prompt
bench --prompts broken.jsonl                         | line 1 of
bench --prompts latin.txt                            | no UTF-8 text
bench --prompts chat.jsonl                           | no chat template
bench --prompts long.txt                             | the policy was built for
bench --prompts long.txt --task arithmetic           | judges its own problems
bench --prompts gsm8k:nowhere.jsonl                  | give a file of GSM8K
bench --workload wide                                | 'grouped'
bench --workload grouped --siblings 0                | siblings and epochs must be at least 1
bench --workload skewed --max-tokens 2               | give max_tokens of at least that
bench --policy POLICY --against all                  | generate, continuous_batching, assisted
bench --against vllm --peers-python nowhere/python   | run `make peers`
bench --against generate_process --dtype half        | bfloat16
bench --json no/such/folder.json                     | there is no folder
bench --json folder                                  | is a folder: give a file
bench --json /proc/rows.json                         | /proc
bench --picture no/such/folder.png                   | there is no folder
bench --picture speed.gif                            | ends in .png
bench --policy POLICY --plans two_forward --picture a.png | add 'plain'
bench --sweep                                        | has none: give --task arithmetic
bench --sweep --task nowhere:task                    | no module 'nowhere'
bench --sweep --task arithmetic --plans wild         | 'two_forward'
bench --sweep --task arithmetic --plans plain        | plans that draft
bench --sweep --task arithmetic --mix-weight 1,1.2   | between 0 and 1
bench --sweep --task arithmetic --temperature 0      | no greedy form
bench --sweep --task arithmetic --draft-temperature x | --draft-temperature takes numbers
bench --sweep --task arithmetic --batch 1,8          | a sweep takes one
bench --sweep --task arithmetic --samples 2          | at least 3 samples
bench --sweep --task arithmetic --num-prompts 0      | must be at least 1
bench --sweep --task arithmetic --num-prompts 1      | at least 2, got 1
bench --sweep --task arithmetic --max-loss 2         | from 0 to below 1
bench --sweep --task arithmetic --reward-high 0      | reward_low must be below
bench --sweep --task arithmetic --repeats 3          | --repeats has no use with --sweep
bench --sweep --task arithmetic --prompts nowhere.jsonl | there is no such file
bench --sweep --task arithmetic --prompts one.txt --num-prompts 3 | there are 1
bench --policy POLICY --sweep --task arithmetic --prompts two.txt | none of the 2 rollouts
bench --max-loss 0.1                                 | give --sweep too
bench --task mine:task                               | is for a sweep
train                                                | say what to train
train --show-config train.steps=0                    | at least 1
train nowhere.yaml                                   | no config file
train folder                                         | no config file
train good.yaml list.yaml                            | one config file is read
train broken.yaml                                    | broken.yaml is no valid YAML: line 1
train list.yaml                                      | must hold a mapping
train tab.yaml                                       | line 2, column 1
train twice.yaml                                     | stands twice
train latin.yaml                                     | no UTF-8 text
train train.stepz=3                                  | did you mean 'steps'
train train.steps                                    | no config file at train.steps
train train.steps=[                                  | no valid YAML
train max_new_tokens=3                               | rollout.max_tokens
train --train.steps=3                                | written without dashes
train --steps 3                                      | written without dashes
train policy.dtype=float8                            | must be one of 'float32'
train rollout.plan=wild                              | rollout.plan must be 'plain'
train good.yaml rollout.plan=fused(9999)             | rollout.plan may draft at most 256
train good.yaml policy.path=POLICY rollout.plan=two_forward(128) rollout.backend=ray | give K of at most 127
train good.yaml --metrics-port 70000                  | --metrics-port
train good.yaml metrics_port=1 metrics_host=256.1.1.1 | metrics_host '256.1.1.1' cannot be listened on
train good.yaml name=a/../../b                       | below runs_dir
train good.yaml name=..                              | below runs_dir
train good.yaml name=/tmp                            | below runs_dir
train good.yaml name=                                | name must be
train good.yaml policy.device=foo                    | none that torch knows
train good.yaml policy.path=nowhere                  | give a folder with config.json
train good.yaml policy.adapter=folder                | no draft adapter in folder
train good.yaml rollout.plan=two_forward             | make an adapter
train good.yaml rollout.plan=two_forward rollout.backend=ray | make an adapter
train good.yaml task=arithmetics                     | 'module:attribute'
train good.yaml task=:x                              | 'module:attribute'
train good.yaml task=no_such_module:x                | no module 'no_such_module'
train good.yaml task=task_without:y                  | has no attribute 'y'
train good.yaml task=task_without:x                  | must be a Task
train good.yaml task=json:dumps                      | must be a Task
train good.yaml runs_dir=list.yaml                   | is a file
train good.yaml rollout.audit=all rollout.audit_dir=list.yaml | is a file
train good.yaml name=begun                           | --resume runs/begun
train --resume runs/nowhere                          | not the folder of a run
train --resume list.yaml                             | not the folder of a run
train --resume runs/broken                           | no valid YAML
train --resume runs/begun                            | no checkpoint
train good.yaml --resume runs/begun                  | leave out good.yaml
convert                                              | give --out FOLDER
convert --out list.yaml                              | list.yaml
convert --out list.yaml/below                        | is a file
convert --out folder                                 | folder exists
convert --out o --policy nowhere                     | give a folder with config.json
convert --out o --prompts nowhere.jsonl              | no prompts file
convert --out o --prompts broken.jsonl               | line 1 of
convert --out o --prompts chat.jsonl                 | no chat template
convert --out o --device foo                         | none that torch knows
convert --out o draft.rnk=3                          | did you mean 'rank'
convert --out o draft.block_sizes=[4,9999]           | between 1 and 256
convert --out o --max-tokens 0                       | at least 1
convert --out o --num-replicas 2                     | here it is --replicas
convert --resume folder                              | no conversion was begun
report nowhere                                       | no run folder
report list.yaml                                     | no run folder
report                                               | give the folder of a run
report --once runs/begun                             | give both
report --live nowhere                                | no run folder
report --grafana no/such/folder.json                 | there is no folder
report runs/begun                                    | train first
doctor --model nowhere                               | give a folder with config.json
doctor --model noweights                             | the weights of the checkpoint
doctor --model POLICY --adapter nowhere              | no draft adapter in nowhere
doctor --model POLICY --device foo                   | none that torch knows
doctor --model POLICY --prompts nowhere              | there is no such file
doctor --model POLICY --prompts long.txt             | room for
doctor --model POLICY --prompts chat.jsonl           | no chat template
doctor --model notokenizer --prompts long.txt        | no tokenizer
doctor --adapter nowhere                             | give --model too
doctor --prompts long.txt                            | give --model too
doctor policy.dtype=bfloat16                         | give --model too
doctor --model POLICY policy.path=nowhere            | here it is --model
doctor --model POLICY train.steps=3                  | options of policy and rollout alone
doctor --model POLICY rollout.memory_fraction=2      | at most 1
doctor --model POLICY rollout.max_cache_rows=3       | takes 32 rows
audit show nowhere                                   | no folder
audit show folder                                    | no audit in folder
audit check nowhere                                  | no folder
audit check runs/begun                               | no audit
audit stats folder                                   | no audit in folder
audit shw                                            | Did you mean 'show'
demo --steps 0                                       | --steps
demo --backend mpi                                   | 'ray', 'local'
trian                                                | Did you mean 'train'
--bogus                                              | blockroll has no option --bogus
"""


CASES = [[part.strip() for part in line.rsplit("|", 1)] for line in WRONG.strip().splitlines()]


@pytest.mark.parametrize(("typed", "advice"), CASES, ids=[typed for typed, _ in CASES])
def test_what_cannot_be_done_is_one_line_with_advice_and_exit_code_2(folder, monkeypatch, typed, advice):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    before = {path.name for path in folder.iterdir()} | {path.name for path in folder.glob("runs/*")}
    result = blockroll(*["1+" * 200 if argument == "XXXXXX" else argument for argument in shlex.split(typed)])

    assert result.exit_code == 2, result.output
    line = result.stderr.removesuffix("\n")
    assert line.startswith("Error: ")
    assert "\n" not in line
    assert advice in line
    assert "--debug shows" not in line  # an error that blockroll has no words for
    after = {path.name for path in folder.iterdir()} | {path.name for path in folder.glob("runs/*")}
    assert after - {"__pycache__"} == before - {"__pycache__"}


@pytest.mark.parametrize(
    ("task", "found"),
    [("task_raises:task", "RuntimeError: boom (in task, "), ("task_unreadable:task", "SyntaxError: ")],
)
def test_a_task_that_raises_is_one_line_with_its_place_and_exit_code_1(folder, monkeypatch, task, found):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    result = blockroll("train", "good.yaml", f"task={task}")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {found}")
    assert result.stderr.count("\n") == 1


def test_what_was_begun_and_failed_has_exit_code_1(monkeypatch):
    def failing(*arguments, **options):
        raise WeightSyncError("replica 0 refused\nversion 3")

    monkeypatch.setattr("blockroll.rl_loops.loop.train", failing)
    result = blockroll("train", "train.steps=1")
    assert (result.exit_code, result.stderr) == (1, "Error: replica 0 refused version 3\n")


@pytest.mark.parametrize("arguments", [("--debug", "report", "x"), ("report", "x", "--debug")])
def test_debug_lets_the_traceback_through_wherever_it_stands(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert type(blockroll(*arguments).exception).__name__ == "InvalidInput"


def test_an_environment_variable_lets_the_traceback_through(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLOCKROLL_DEBUG", "1")
    assert type(blockroll("report", "x").exception).__name__ == "InvalidInput"


@pytest.mark.parametrize("example", sorted({each for some in EXAMPLES.values() for each in some}))
def test_every_example_of_a_help_text_names_arguments_that_there_are(example):
    words = shlex.split(example)[1:]
    num_words = 2 if words[0] == "audit" else 1
    listed = blockroll(*words[:num_words], "--help").stdout
    for word in words[num_words:]:
        assert not word.startswith("--") or word in listed, word


@pytest.mark.parametrize("command", EXAMPLES)
def test_every_help_text_ends_with_examples(command):
    result = blockroll(*command.split(), "--help")
    assert result.exit_code == 0
    for example in EXAMPLES[command]:
        assert f"  {example}\n" in result.stdout
    assert epilog(command).count("\n") == 1 + len(EXAMPLES[command])


@pytest.mark.parametrize("example", sum(EXAMPLES.values(), ()))
def test_every_option_of_an_example_exists(example):
    _, *words = shlex.split(example)
    names = {each.name or each.callback.__name__ for each in cli.app.registered_commands} | {"audit"}
    assert words[0] in names
    command = words[:2] if words[0] == "audit" else words[:1]
    shown = blockroll(*command, "--help").stdout
    for option in (word for word in words if word.startswith("--")):
        assert f"{option} " in shown or f"{option}\n" in shown


def test_a_warning_is_one_line_without_a_place_in_the_code(policy_path):
    # Its own process: here a warning is an error.
    command = [
        sys.executable,
        "-m",
        "blockroll",
        "generate",
        "hi",
        "--policy",
        policy_path,
        "--max-tokens",
        "2",
    ]
    done = subprocess.run([*command, "--plan", "two_forward(6)"], capture_output=True, text=True, check=True)
    warned = [line for line in done.stderr.splitlines() if "arn" in line]
    assert len(warned) == 1
    assert warned[0].startswith("Warning: plan two_forward(6) drafts more than the 4 tokens")


def test_the_demo_says_where_it_cannot_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file")
    result = blockroll("demo")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "runs is a file" in result.stderr


def test_shells_can_complete():
    shown = blockroll("--help").stdout
    assert "--install-completion" in shown
    assert "--show-completion" in shown
