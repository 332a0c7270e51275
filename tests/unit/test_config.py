"""Options: every one is a field, and a file or an override that is wrong says what would be right."""

import dataclasses

import pytest
import yaml

from blockroll.config import (
    ConvertConfig,
    DraftConfig,
    PolicyConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
    from_mapping,
    load_config,
    to_mapping,
)
from blockroll.errors import BlockrollError, ConfigError, InvalidInput
from blockroll.types import Sampling, SamplingOptions


def config_from(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path)


def test_no_file_and_no_override_gives_the_defaults():
    assert load_config() == RunConfig()


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert config_from(tmp_path, "# nothing chosen\n") == RunConfig()


def test_a_file_sets_what_it_names_and_leaves_the_rest(tmp_path):
    config = config_from(tmp_path, "name: first\nrollout:\n  num_replicas: 1\ntrain:\n  steps: 3\n")
    assert config == RunConfig(
        name="first", rollout=RolloutConfig(num_replicas=1), train=TrainConfig(steps=3)
    )


def test_an_override_wins_over_the_file_and_a_later_one_over_an_earlier(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  steps: 3\n  group_size: 4\n")
    config = load_config(path, ["train.steps=5", "train.steps=7", "seed=2"])
    assert (config.train.steps, config.train.group_size, config.seed) == (7, 4, 2)


def test_overrides_read_booleans_numbers_and_text_as_yaml_does():
    config = load_config(
        None, ["wandb=true", "rollout.temperature=0.5", "rollout.plan=two_forward(4)", "name = spaced"]
    )
    assert (config.wandb, config.rollout.temperature) == (True, 0.5)
    assert (config.rollout.plan, config.name) == ("two_forward(4)", "spaced")


def test_on_and_off_are_words_as_options_take_them(tmp_path):
    config = load_config(None, ["policy.prepack=off", "policy.compile=on", "rollout.audit=off", "wandb=yes"])
    assert (config.policy.prepack, config.policy.compile, config.rollout.audit) == ("off", "on", "off")
    assert config.wandb is True


def test_an_override_keeps_equals_signs_that_belong_to_its_value():
    assert load_config(None, ["task=module:a=b"]).task == "module:a=b"


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_a_learning_rate_may_be_written_in_any_way_yaml_users_write_it(tmp_path, text):
    config = config_from(tmp_path, f"train:\n  learning_rate: {text}\n")
    assert config.train.learning_rate == 1e-4


def test_a_whole_number_is_a_float_where_a_float_is_asked():
    temperature = load_config(None, ["rollout.temperature=1"]).rollout.temperature
    assert isinstance(temperature, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, r"unknown option 'sed'; did you mean 'seed'\?"),
        (
            {"train": {"learning_rat": 1}},
            r"unknown option 'train\.learning_rat'; did you mean 'learning_rate'\?",
        ),
        ({"rolout": {}}, r"unknown option 'rolout'; did you mean 'rollout'\?"),
        ({"policy": {"zzz": 1}}, r"unknown option 'policy\.zzz'; allowed are adapter, compile, device"),
        ({1: 2}, r"unknown option '1'; allowed are"),
    ],
)
def test_an_unknown_key_names_its_section_and_the_nearest_key_or_all_of_them(values, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(RunConfig, values)


def test_an_override_of_an_unknown_key_is_refused_like_one_in_a_file():
    with pytest.raises(ConfigError, match=r"unknown option 'train\.step'; did you mean 'steps'"):
        load_config(None, ["train.step=1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1.5", r"seed must be int, got 1\.5"),
        ("seed=true", r"seed must be int, got True"),
        ("seed=null", r"seed must be int, got None"),
        ("wandb=1", r"wandb must be bool, got 1"),
        ("name=3", r"name must be str, got 3"),
        ("train.steps=ten", r"train\.steps must be int, got 'ten'"),
        ("train.learning_rate=fast", r"train\.learning_rate must be a number, got 'fast'"),
        ("train.learning_rate=[1]", r"train\.learning_rate must be float, got \[1\]"),
        ("train.learning_rate=true", r"train\.learning_rate must be float, got True"),
        (
            "policy.dtype=float64",
            r"policy\.dtype must be one of 'float32', 'bfloat16', 'float16', got 'float64'",
        ),
        ("rollout.backend=mpi", r"rollout\.backend must be one of 'ray', 'local', got 'mpi'"),
        ("rollout=2", r"rollout is a section with options, got 2"),
        ("train=null", r"train is a section with options, got None"),
    ],
)
def test_a_value_of_the_wrong_type_names_its_key_and_what_is_allowed(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.num_replicas=0", r"num_replicas must be at least 1, got 0"),
        ("rollout.threads_per_replica=0", r"threads_per_replica must be at least 1, got 0"),
        ("rollout.max_tokens=0", r"max_tokens must be at least 1, got 0"),
        ("rollout.temperature=-0.1", r"temperature must be at least 0, got -0\.1"),
        ("rollout.temperature=.nan", r"temperature must be at least 0, got nan"),
        ("rollout.max_length=-1", r"max_length must be at least 0, got -1"),
        ("train.steps=0", r"steps must be at least 1, got 0"),
        ("train.group_size=1", r"group_size must be at least 2, got 1"),
        ("train.learning_rate=-1e-3", r"learning_rate must be at least 0, got -0\.001"),
        ("train.behavior_ratio_cap=0.5", r"behavior_ratio_cap must be at least 1, got 0\.5"),
    ],
)
def test_a_value_outside_its_range_names_the_range(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


def test_an_override_without_an_equals_sign_shows_how_one_is_written():
    with pytest.raises(ConfigError, match=r"section\.field=value, got 'train\.steps'"):
        load_config(None, ["train.steps"])


def test_an_override_below_a_value_is_refused():
    with pytest.raises(ConfigError, match=r"'seed' in 'seed\.low=1' is a value, not a section"):
        load_config(None, ["seed=1", "seed.low=1"])


@pytest.mark.parametrize("text", ["- a\n- b\n", "only text\n", "7\n"])
def test_a_file_that_holds_no_mapping_is_refused_by_name(tmp_path, text):
    with pytest.raises(ConfigError, match=r"run\.yaml must hold a mapping of options, got (list|str|int)"):
        config_from(tmp_path, text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train: [1, 2", r"run\.yaml is no valid YAML: line 1, column 13: .*expected ',' or ']'"),
        (b"train:\n\tsteps: 3\n", r"run\.yaml is no valid YAML: line 2, column 1: .*'\\t'"),
        (b"seed: 1\nname: a\nseed: 2\n", r"line 3, column 1: 'seed' stands twice in one section"),
        (b"train: {steps: 1, steps: 1}\n", r"line 1, column 19: 'steps' stands twice in one section"),
        (b"train: !!python/object:os.system {}\n", r"line 1, column 8: could not determine a constructor"),
        (b"name: caf\xe9\n", r"run\.yaml is no UTF-8 text \(byte 9 is 0xe9\)"),
        (b"name: \x00\n", r"run\.yaml is no valid YAML"),
        (b"seed: 2020-13-45\n", r"run\.yaml is no valid YAML: month must be in 1..12"),
        (b"seed: 2020-12-24\n", r"seed must be int, got datetime\.date\(2020, 12, 24\)"),
        (b"[" * 5000, r"run\.yaml is no valid YAML: it is nested too deeply"),
        (b"a: b: c\n", r"run\.yaml is no valid YAML: line 1, column 5: mapping values are not allowed here"),
    ],
    ids=lambda value: value[:20].decode(errors="replace") if isinstance(value, bytes) else "",
)
def test_a_broken_file_is_one_line_that_names_the_place(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_folder_and_a_missing_file_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read as a config file: Is a directory"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match=r"no config file at .*none\.yaml"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("override", ["train.steps=[1", "name=a: b: c", "name={a: 1, a: 2}", "name=@x"])
def test_an_override_whose_value_is_no_yaml_is_refused_by_name(override):
    with pytest.raises(ConfigError, match=r"the value in '.*' is no valid YAML"):
        load_config(None, [override])


def test_all_that_is_wrong_with_a_file_is_said_at_once():
    with pytest.raises(
        ConfigError, match=r"seed must be int, got 'x'; train\.steps must be .*, got 0; unknown"
    ):
        from_mapping(RunConfig, {"seed": "x", "train": {"steps": 0}, "polcy": {}})


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("rollout.max_new_tokens", "here it is called 'max_tokens'"),
        ("max_new_tokens", r"here it is 'rollout\.max_tokens'"),
        ("temperature", r"here it is 'rollout\.temperature'"),
        ("lr", r"here it is 'train\.learning_rate'"),
        ("train.num_generations", "here it is called 'group_size'"),
        ("train.top_k", r"here it is 'rollout\.top_k'"),
    ],
)
def test_a_name_of_another_library_or_of_another_section_is_answered_with_ours(key, advice):
    with pytest.raises(ConfigError, match=f"unknown option '{key}'; {advice}"):
        load_config(None, [f"{key}=1"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_sizes": [4, 0]}, r"block_sizes\[1\] must be between 1 and 256, got 0"),
        ({"block_sizes": []}, r"block_sizes must be one or more values, got \[\]"),
        ({"block_sizes": 4}, r"block_sizes must be a list, got 4"),
        ({"layouts": ["fusd"]}, r"layouts\[0\] must be one of 'two_forward', 'fused', got 'fusd'"),
        ({"conversion": "full", "causal_weight": 0}, r"causal_weight must be above 0 in a full conversion"),
        ({"rank": "32" * 200}, r"rank must be int, got '3232.*\.\.\..*32'$"),
    ],
)
def test_an_item_of_a_list_is_named_by_its_place(values, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(DraftConfig, values)


def test_a_section_s_own_rule_names_the_section_and_a_missing_option_is_named():
    with pytest.raises(ConfigError, match=r"draft\.causal_weight must be above 0 in a full conversion"):
        from_mapping(
            ConvertConfig, {"out": "x", "draft": {"conversion": "full", "causal_weight": 0}, "seed": 1}
        )
    with pytest.raises(ConfigError, match="option 'out' is missing"):
        from_mapping(ConvertConfig, {})


def test_options_given_in_python_are_checked_like_those_of_a_file():
    with pytest.raises(ConfigError, match=r"top_p must be above 0 and at most 1, got 1\.5; 1 keeps all"):
        RolloutConfig(top_p=1.5)
    with pytest.raises(ConfigError, match="unknown option 'temprature'; did you mean 'temperature'"):
        RolloutConfig(temprature=1.0)
    with pytest.raises(ConfigError, match="steps must be at least 1, got 0"):
        dataclasses.replace(TrainConfig(), steps=0)


def test_every_option_of_sampling_is_an_option_of_rollouts_with_the_same_bounds():
    config = RolloutConfig(temperature=0.7, top_k=5, min_p=0.1, mix_weight=1, frequency_penalty=0.5)
    sampling = config.sampling(min_tokens=3)
    for each in dataclasses.fields(SamplingOptions):
        assert getattr(sampling, each.name) == getattr(config, each.name)
    assert (sampling.law.weight, sampling.min_tokens) == (1.0, 3)
    for name, value in (("temperature", -1.0), ("top_p", 0.0), ("min_p", 2.0), ("top_k", -1)):
        with pytest.raises(ConfigError) as of_config:
            RolloutConfig(**{name: value})
        with pytest.raises(InvalidInput) as of_sampling:
            Sampling(**{name: value})
        assert str(of_config.value) == str(of_sampling.value)


def test_a_config_error_is_a_value_error_and_a_blockroll_error():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, BlockrollError)


def test_a_config_comes_back_equal_from_its_own_yaml(tmp_path):
    config = RunConfig(
        name="again", train=TrainConfig(learning_rate=1e-5), policy=PolicyConfig(dtype="bfloat16")
    )
    assert config_from(tmp_path, yaml.safe_dump(to_mapping(config))) == config


def test_a_config_cannot_be_changed_after_it_is_built():
    config = RunConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_the_run_folder_lies_below_the_runs_folder():
    config = load_config(None, ["name=demo", "runs_dir=out"])
    assert config.run_dir.parts == ("out", "demo")
