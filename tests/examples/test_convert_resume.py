"""A conversion that goes on: what may change, what is refused or damaged, when it stops, what it says."""

import dataclasses
import json
import math
import random

import pytest
from typer.testing import CliRunner

from blockroll import cli
from blockroll.config import ConvertConfig, DraftConfig, PolicyConfig
from blockroll.errors import CheckpointError, ConfigError, InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.convert import STATE_FILE, convert, load_convert_config
from blockroll.rl_loops.convert_report import expected_tokens, predicted_speedup
from blockroll.rl_loops.convert_state import CONFIG_FILE, KindMetrics, Progressed, is_rising, stop_reason
from blockroll.types import Plan

PROMPTS = [{"prompt": f"{n}+{n}=?\n"} for n in range(12)]


def command(*arguments):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A conversion that stopped after one round, and the files it was begun with, beside it."""
    folder = tmp_path_factory.mktemp("conversion")
    policy = HFPolicy.from_pretrained("tiny")
    del policy.model.config.blockroll
    policy.save_pretrained(folder / "bare")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    config = ConvertConfig(
        out="adapter",
        prompts="prompts.jsonl",
        policy=PolicyConfig(path="bare"),
        draft=DraftConfig(rank=2, block_sizes=(2,), layouts=("two_forward",)),
        max_tokens=10,
        prompts_per_round=3,
        completion_tokens=8,
        steps_per_round=1,
        max_batch_size=3,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        convert(config)
    return folder


@pytest.fixture
def copied(begun, tmp_path):
    """The same in a folder of its own: it may be gone on with, or broken."""
    out = tmp_path / "adapter"
    out.mkdir()
    for path in (begun / "adapter").iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


def test_a_stopped_conversion_goes_on_with_more_budget_from_any_working_folder(copied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = load_convert_config(copied)
    assert before.policy.path.endswith("/bare")
    assert before.prompts.endswith("/prompts.jsonl")
    code, said = command("convert", "--resume", "adapter")
    assert code == 0, said
    assert "max_tokens is 10" in said
    assert f"To go on all the same: blockroll convert --resume {copied} --max-tokens 20" in said
    code, said = command("convert", "--resume", "adapter", "--max-tokens", 40, "patience=3")
    assert code == 0, said
    assert "max_tokens is 40" in said
    after = load_convert_config(copied)
    assert (after.max_tokens, after.patience) == (40, 3)


def test_an_option_that_would_make_it_another_conversion_is_refused_with_both_values(copied, tmp_path):
    code, said = command("convert", "--resume", copied, "--seed", 5, "draft.rank=9", "completion_tokens=4")
    assert code == 2
    for part in ("seed is 5, begun with 0", "draft.rank is 9, begun with 2", "completion_tokens is 4, begun"):
        assert part in said
    code, said = command("convert", "--resume", copied, "--conversion", "full")
    assert code == 2
    assert "draft.conversion is 'full', begun with 'adapter'" in said
    code, said = command("convert", "--resume", copied, "--out", tmp_path / "elsewhere")
    assert code == 2
    assert "leave one of them out" in said


@pytest.mark.parametrize("name", sorted(each.name for each in dataclasses.fields(DraftConfig)))
def test_no_option_of_the_drafts_is_ignored_on_resume(begun, name):
    config = load_convert_config(begun / "adapter")
    other = {
        "conversion": "full",
        "block_sizes": (3,),
        "layouts": ("fused",),
        "loss": "tv",
        "mask_token_id": 5,
    }
    changed = other.get(name, getattr(config.draft, name))
    if name not in other:
        changed = changed + 1
    draft = dataclasses.replace(config.draft, **{name: changed})
    with pytest.raises(ConfigError, match=rf"draft\.{name} is .*begun with"):
        convert(dataclasses.replace(config, draft=draft), resume=True)


def test_files_may_move_but_not_change(copied, begun, tmp_path):
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes((begun / "prompts.jsonl").read_bytes())
    config = dataclasses.replace(load_convert_config(copied), max_tokens=40, prompts=str(moved))
    assert convert(config, resume=True).num_tokens >= 40
    more = dataclasses.replace(config, max_tokens=80)
    moved.write_text('{"prompt": "1"}\n')
    with pytest.raises(CheckpointError, match=r"prompts .*holds something else"):
        convert(more, resume=True)
    moved.write_bytes((begun / "prompts.jsonl").read_bytes())
    policy = HFPolicy.from_pretrained(begun / "bare")
    policy.model.lm_head.weight.data[0, 0] += 1
    with pytest.raises(CheckpointError, match=r"policy\.path .*holds something else"):
        convert(more, resume=True, policy=policy)


def test_a_conversion_that_was_stopped_in_its_first_round_begins_again(copied):
    for path in copied.iterdir():
        if path.name != CONFIG_FILE:
            path.unlink()
    assert convert(load_convert_config(copied), resume=True).num_tokens >= 10


DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "text": lambda data: b"not what it was\n",
    "one bit": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    ),
}


@pytest.mark.parametrize(
    ("name", "damage"),
    # A changed letter of a config is another option or another value.
    [*((STATE_FILE, damage) for damage in DAMAGES), *((CONFIG_FILE, damage) for damage in list(DAMAGES)[:3])],
)
def test_a_damaged_file_is_one_line_that_names_it(copied, name, damage):
    path = copied / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    code, said = command("convert", "--resume", copied, "--max-tokens", 40)
    assert code == 2
    assert said.startswith("Error: ")
    assert f"{name} is damaged" in said
    assert "Traceback" not in said


def flat(rounds, value, seed=0, noise=0.05):
    draw = random.Random(seed)
    return [value + draw.gauss(0, noise) for _ in range(rounds)]


def test_it_stops_only_when_no_layout_and_no_position_rises():
    config = ConvertConfig(out="unused", max_tokens=10**9, patience=8)
    names = [
        "two_forward(2)",
        "fused(2)",
        *(f"{k}(2) position {i}" for k in ("two_forward", "fused") for i in (1, 2)),
    ]
    still = {name: flat(16, 0.8, seed=index) for index, name in enumerate(names)}

    def reason(series):
        rows = [dict(zip(series, values, strict=True)) for values in zip(*series.values(), strict=True)]
        return stop_reason(config, Progressed(round=16, scores=tuple(rows)))

    assert "two_forward(2) at 0.8" in reason(still)
    assert "fused(2) at 0." in reason(still)
    for name in names:
        rising = [value + 0.03 * index for index, value in enumerate(flat(16, 0.3, seed=7))]
        assert reason({**still, name: rising}) is None, name
    unmet = {**still, "fused(2) position 2": [math.nan] * 16}
    assert reason(unmet) is not None
    assert stop_reason(config, Progressed(round=3, scores=({}, {}, {}))) is None


def test_a_rise_within_the_noise_is_none_and_one_beyond_it_is_one():
    config = ConvertConfig(out="unused", patience=8, min_gain=0.0)
    by_chance = [is_rising(config, flat(40, 1.0, seed=seed)) for seed in range(400)]
    assert sum(by_chance) / 400 < 0.12
    assert is_rising(config, [*flat(8, 1.0), *flat(8, 1.2)])
    assert not is_rising(dataclasses.replace(config, min_gain=0.5), [*flat(8, 1.0), *flat(8, 1.2)])


def kind(layout, acceptance):
    whole = 1 + sum(math.prod(acceptance[: i + 1]) for i in range(len(acceptance)))
    return KindMetrics(
        layout=layout,
        num_drafts=len(acceptance),
        acceptance_K=tuple(acceptance),
        tokens_per_step=whole,
        policy_kl=math.nan,
    )


def test_no_speed_up_above_tokens_per_forward_is_predicted():
    two_forward, fused = Plan(8), Plan(8, (0, 8))
    cheap = {(Plan(0), 1): 1.0, (two_forward, 1): 0.8, (fused, 1): 0.5}
    assert predicted_speedup(6.0, two_forward, 1, cheap) == pytest.approx(3.0)
    assert predicted_speedup(6.0, fused, 1, cheap) == pytest.approx(6.0)
    dear = {(Plan(0), 1): 1.0, (two_forward, 1): 4.0}
    assert predicted_speedup(6.0, two_forward, 1, dear) == pytest.approx(1.5)


def test_a_fused_plan_is_credited_only_with_the_drafts_that_its_levels_leave():
    some = kind("fused", (0.9, 0.5, 0.5, 0.2))
    every_level = expected_tokens(some, Plan(4, (0, 1, 2, 3, 4)))
    assert every_level == pytest.approx(some.tokens_per_step)
    ends, lowest = expected_tokens(some, Plan(4, (0, 4))), expected_tokens(some, Plan(4, (0,)))
    assert 1 < lowest < ends < every_level
    # One draft, level 0 alone: after it is accepted a step has none. Shares 1 : a, tokens 1 + a and 1.
    a = 0.6
    assert expected_tokens(kind("fused", (a,)), Plan(1, (0,))) == pytest.approx(((1 + a) + a) / (1 + a))
    assert expected_tokens(kind("two_forward", (0.5, 0.5)), Plan(2)) == pytest.approx(1.75)


def test_the_last_line_says_how_to_use_the_adapter_and_every_command_takes_it(begun, tmp_path, monkeypatch):
    out, bare = begun / "adapter", begun / "bare"
    code, said = command("convert", "--resume", out)
    assert code == 0
    for part in (
        f"--policy {bare} --adapter {out} (generate",
        f'RolloutPool.from_pretrained("{bare}", adapter="{out}")',
        f"policy.adapter={out}",
        f'GRPOTrainer(..., adapter="{out}") in TRL.',
    ):
        assert part in said
    code, said = command(
        "generate", "1+1=?", "--policy", bare, "--adapter", out, "--plan", "two_forward(2)", "--max-tokens", 8
    )
    assert code == 0, said
    assert "drafts" in said
    for words in (
        ("bench", "--policy", bare, "--batch", 1, "--rollouts", 1, "--repeats", 1, "--max-tokens", 4),
        ("doctor", "--model", bare),
        ("train", f"policy.path={bare}", f"runs_dir={tmp_path}"),
        ("convert", "--policy", bare, "--out", tmp_path / "more"),
    ):
        code, said = command(*words, "--adapter", tmp_path / "nowhere")
        assert code == 2, said
        assert "no draft adapter in" in said


def test_bare_convert_says_what_to_give():
    with pytest.raises(InvalidInput, match="give --out FOLDER"):
        CliRunner().invoke(cli.app, ["--debug", "convert"], catch_exceptions=False)
