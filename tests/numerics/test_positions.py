"""Rotary positions that depend on a text's length: one law per text, whatever stands beside it."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from blockroll.config import TrainConfig
from blockroll.errors import CheckpointError, InvalidInput
from blockroll.policies import hf
from blockroll.policies.hf import HFPolicy
from blockroll.policies.loading import resolve_checkpoint
from blockroll.policies.positions import context_of
from blockroll.rl_loops.grpo import GRPO
from blockroll.rl_loops.learner import Learner
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.requests import Limits, check_request
from blockroll.types import Plan, Request, Sampling
from tests.engines import make_requests, run
from tests.equality import assert_same_rollouts
from tests.models import FAMILIES, MASK_ID, SHAPE, VOCAB_SIZE

BOUNDARY = 24
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": BOUNDARY,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
KINDS = {
    "llama": LONGROPE,
    "qwen3": LONGROPE,
    "gemma3_text": {"full_attention": LONGROPE, "sliding_attention": PLAIN},
}
PLANS = (Plan(num_drafts=0), Plan(num_drafts=3), Plan(num_drafts=3, levels=(0, 2)))
ENDLESS = Sampling(max_tokens=40, ignore_eos=True)


def model(family="llama", parameters=LONGROPE, **options):
    """A small causal LM whose scores depend on positions."""
    torch.manual_seed(0)
    shape = {**SHAPE, **FAMILIES[family], "rope_parameters": parameters, **options}
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    made.config.blockroll = {
        "mask_token_id": MASK_ID,
        "block_sizes": [3],
        "layouts": ["two_forward", "fused"],
    }
    return made.eval()


def prompt(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(4, VOCAB_SIZE, (length,), generator=generator).tolist())


@torch.no_grad()
def gaps(family, parameters, rollout):
    """How far recorded log-probabilities are from stock forwards of the whole text, and of each prefix."""
    first = len(rollout.request.prompt_ids)
    ids = torch.tensor([[*rollout.request.prompt_ids, *rollout.token_ids]])
    recorded = torch.tensor(rollout.policy_logprobs)

    def stock(length):
        # Made anew: one of several layer types survives a single long forward in early transformers 5.
        return model(family, parameters)(input_ids=ids[:, :length]).logits[0]

    whole = stock(ids.shape[1])[first - 1 : -1]
    each = [stock(end)[-1] for end in range(first, ids.shape[1])]
    return [
        float((logits.log_softmax(-1).gather(-1, ids[0, first:, None])[:, 0] - recorded).abs().max())
        for logits in (whole, torch.stack(each))
    ]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize("family", KINDS)
def test_the_law_of_a_longrope_text_is_that_of_its_own_forward_in_any_batch(family, plan):
    policy = HFPolicy(model(family, KINDS[family]))
    prompts = [prompt(length, seed) for seed, length in enumerate((5, 40, BOUNDARY - 3, BOUNDARY + 1))]
    rollouts = run(policy, make_requests(prompts, ENDLESS), plan)
    assert [len(rollout.token_ids) for rollout in (rollouts[f"r{n}"] for n in range(4))] == [19, 40, 3, 40]
    for rollout in rollouts.values():
        assert max(gaps(family, KINDS[family], rollout)) < 1e-4
        assert rollout.finish_reason == "length"


def test_the_same_text_has_the_same_law_beside_a_long_one():
    policy = HFPolicy(model())
    alone, long = make_requests([prompt(8), prompt(50, 1)], ENDLESS)
    beside = run(policy, [alone, long], PLANS[0])["r0"]
    assert_same_rollouts(run(policy, [alone], PLANS[0]), [beside], policy)


def test_stock_factors_would_be_seen_to_mix_the_laws_of_a_batch(monkeypatch):
    monkeypatch.setattr(hf, "use_text_rotary", lambda model: None)
    policy = HFPolicy(model())
    rollouts = run(policy, make_requests([prompt(8), prompt(50, 1)], ENDLESS), PLANS[0])
    assert max(gaps("llama", LONGROPE, rollouts["r0"])) > 1e-2


def test_a_long_text_takes_no_rows_over_from_a_short_one_with_the_same_beginning():
    engine = Engine(HFPolicy(model()), plan=Plan(num_drafts=0))
    for length in (20, 60, 16):
        request = Request(request_id=f"{length}", prompt_ids=prompt(60)[:length], seed=1, sampling=ENDLESS)
        engine.submit([request])
        finished = ()
        while not finished:
            finished = engine.step().finished
        assert max(gaps("llama", LONGROPE, finished[0])) < 1e-4


def test_a_prompt_that_ends_on_the_boundary_is_refused_with_advice():
    limits = Limits(vocab_size=VOCAB_SIZE, max_length=96, boundaries=(BOUNDARY,))
    for length in (BOUNDARY - 1, BOUNDARY + 1):
        check_request(make_requests([prompt(length)], ENDLESS)[0], limits)
    with pytest.raises(InvalidInput, match=r"24 tokens, exactly as many .* one token shorter or longer"):
        check_request(make_requests([prompt(BOUNDARY)], ENDLESS)[0], limits)
    assert [limits.room(length) for length in (1, 23, 24, 25, 95, 96, 97)] == [23, 1, 0, 71, 1, 0, 0]


def test_a_context_that_is_lowered_below_the_boundary_is_the_end_of_every_text():
    engine = Engine(HFPolicy(model()), plan=Plan(num_drafts=0), max_length=16)
    assert [engine.limits.room(length) for length in (1, 15, 16, 20)] == [15, 1, 0, 0]
    with pytest.raises(InvalidInput, match="has 20 tokens, but the context holds 16"):
        engine.submit(make_requests([prompt(20)], ENDLESS))


def test_a_learner_recomputes_the_laws_of_a_padded_batch():
    policy = HFPolicy(model())
    requests = make_requests([prompt(8), prompt(50, 1), prompt(20, 2)], ENDLESS)
    rollouts = list(run(policy, requests, PLANS[0]).values())
    recorded = [logprob for rollout in rollouts for logprob in rollout.policy_logprobs]
    learner = Learner(policy, TrainConfig(learner_threads=1), GRPO)
    assert learner._forward(rollouts).logprobs_N.tolist() == pytest.approx(recorded, abs=1e-4)


def test_texts_of_a_dynamic_config_end_where_its_factors_would_begin_to_stretch():
    policy = HFPolicy(model(parameters=DYNAMIC))
    rollouts = run(policy, make_requests([prompt(8), prompt(90, 1)], ENDLESS), PLANS[1])
    assert len(rollouts["r1"].token_ids) == 6
    for rollout in rollouts.values():
        assert max(gaps("llama", DYNAMIC, rollout)) < 1e-4


def yarn(**options):
    return {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, **options}


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}


@pytest.mark.parametrize(
    ("positions", "parameters", "expected"),
    [
        (96, PLAIN, 96),
        (64, yarn(original_max_position_embeddings=64), 256),
        (80, yarn(original_max_position_embeddings=64), 256),  # Qwen3 leaves room for an answer
        (256, yarn(original_max_position_embeddings=64), 256),
        (64, yarn(), 256),
        (64, {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, 128),
        (64, {"type": "linear", "rope_theta": 1e4, "factor": 2.0}, 128),
        (64, {**DYNAMIC}, 64),
        (256, {**LLAMA3, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}, 256),
        (64, {**LLAMA3, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}, 512),
        (256, {**LONGROPE, "original_max_position_embeddings": 64}, 256),
        (64, {**LONGROPE, "original_max_position_embeddings": 64}, 256),
    ],
)
def test_the_context_is_what_the_config_says(positions, parameters, expected):
    options = {**SHAPE, "max_position_embeddings": positions, "rope_parameters": dict(parameters)}
    assert context_of(AutoConfig.for_model("llama", **options)).max_length == expected


def test_a_config_by_layer_type_says_its_scaled_context_itself():
    linear = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    config = model("gemma3_text", {"full_attention": linear, "sliding_attention": PLAIN}).config
    assert context_of(config).max_length == 96
    assert context_of(model("gemma3_text", KINDS["gemma3_text"]).config).boundaries == (BOUNDARY,)


def test_an_old_rope_scaling_section_is_read_and_an_unknown_type_refused_when_the_folder_is(tmp_path):
    model(parameters=PLAIN).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    for kind, expected in (("yarn", 384), ("linear", 384), ("dynamic", 96)):
        section = {"type": kind, "factor": 4.0}
        (tmp_path / "config.json").write_text(json.dumps({**config, "rope_scaling": section}))
        assert HFPolicy.from_pretrained(tmp_path, with_tokenizer=False).max_length == expected
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "rope_scaling": {"type": "su", "factor": 2.0}})
    )
    with pytest.raises(InvalidInput, match="rope type 'su' is not supported; supported are default, linear"):
        resolve_checkpoint(tmp_path)


SCALED = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0},
    "llama3": {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
}
HALF, FACTORS = {"partial_rotary_factor": 0.5}, {"short_factor": [1.0] * 2, "long_factor": [2.0] * 2}
UNUSABLE = [
    *((kind, HALF, "rotates 4 of the 8 numbers of a head") for kind in SCALED if kind != "longrope"),
    ("longrope", {**HALF, **FACTORS}, "rotates 4 of the 8 numbers of a head"),
    ("linear", {"factor": 0.0}, "gives NaN or infinity"),
    ("linear", {"factor": "2"}, "rope type 'linear' cannot be used: unsupported operand"),
    ("longrope", {"short_factor": [1.0] * 3}, "rope type 'longrope' cannot be used"),
    ("longrope", {"long_factor": [1.0] * 3}, "rope type 'longrope' cannot be used"),
]


@pytest.mark.parametrize(("kind", "options", "message"), UNUSABLE)
@pytest.mark.parametrize("where", ["whole", "by layer type", "at the top"])
def test_rotary_parameters_that_no_forward_could_use_are_refused_when_the_folder_is(
    tmp_path, kind, options, message, where
):
    family = "gemma3_text" if where == "by layer type" else "llama"
    by_layer = {"full_attention": PLAIN, "sliding_attention": PLAIN}
    model(family, by_layer if where == "by layer type" else PLAIN).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    parameters = {"rope_type": kind, "rope_theta": 1e4, **SCALED[kind], **options}
    if where == "at the top" and "partial_rotary_factor" in options:  # as older files have it
        config["partial_rotary_factor"] = parameters.pop("partial_rotary_factor")
    config["rope_parameters"] = (
        {**by_layer, "full_attention": parameters} if family != "llama" else parameters
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    if (where, kind) == ("by layer type", "yarn"):
        message += r"|config\.json .* cannot be read: 'original_max"  # by early transformers 5 itself
    with pytest.raises((InvalidInput, CheckpointError), match=message):
        resolve_checkpoint(tmp_path)


@pytest.mark.parametrize("positions", [{"max_position_embeddings": 0}, {"factor": -2.0}])
def test_a_context_that_holds_no_text_is_refused(positions):
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": positions.pop("factor", 2.0)}
    config = AutoConfig.for_model("llama", **{**SHAPE, **positions, "rope_parameters": linear})
    with pytest.raises(InvalidInput, match=r"says a context of (0|-192) tokens"):
        context_of(config)


def test_a_yarn_text_past_the_short_context_has_the_law_of_its_own_forward():
    parameters = yarn(original_max_position_embeddings=48)
    policy = HFPolicy(model(parameters=parameters, max_position_embeddings=48))
    rollouts = run(policy, make_requests([prompt(8), prompt(90, 1)], ENDLESS), PLANS[1], max_length=120)
    for rollout in rollouts.values():
        assert max(gaps("llama", parameters, rollout)) < 1e-4
