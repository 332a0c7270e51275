"""TRL's trainers with our rollouts: what stays TRL's, what the metrics can see, and what is refused."""

import copy
import dataclasses
import itertools
import math
from contextlib import nullcontext

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel

from blockroll.config import AlignmentConfig, DraftConfig, RolloutConfig
from blockroll.errors import (
    AdapterMismatch,
    CheckpointError,
    ConfigError,
    InvalidInput,
    MissingDependency,
    ReplicaError,
)
from blockroll.policies.hf import HFPolicy
from blockroll.policies.loading import TINY_POLICY_DIR, load_tokenizer
from blockroll.rl_loops import arithmetic
from blockroll.rl_loops.tracking import read_lines
from blockroll.rl_loops.trl import GRPOTrainer, RLOOTrainer, make_rollout_func, require_tested
from blockroll.rl_loops.trl.contract import require_parts
from blockroll.rl_loops.trl.weights import sharing_policy
from blockroll.rollout.audit.check import check_audit
from blockroll.rollout.audit.writer import audit_files
from blockroll.rollout.engine.cache import SlotCache
from blockroll.rollout.pool.pool import RolloutPool
from tests.models import FAMILIES, adapted_policy, random_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning",  # what TRL itself calls
)
PROBLEMS = list(itertools.islice(arithmetic.problems(0, held_out=False), 64))
ROWS = Dataset.from_list([{"prompt": problem.prompt, "answer": problem.answer} for problem in PROBLEMS])
TWO_FORWARD = RolloutConfig(plan="two_forward")


def correctness(completions, answer, **_):
    return [arithmetic.reward(text, right) for text, right in zip(completions, answer, strict=True)]


def settings(folder, cls=trl.GRPOConfig, **options):
    defaults = {
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_steps": 2,
        "max_completion_length": 48,
        "learning_rate": 3e-4,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if cls is trl.RLOOConfig:
        defaults["beta"] = 0.0
    return cls(output_dir=str(folder), **{**defaults, **options})


def trainer(folder, cls=GRPOTrainer, *, model=str(TINY_POLICY_DIR), options=None, **arguments):
    if cls in (GRPOTrainer, RLOOTrainer):
        arguments.setdefault("rollout", TWO_FORWARD)
    config = trl.RLOOConfig if cls is RLOOTrainer else trl.GRPOConfig
    arguments.setdefault("reward_funcs", correctness)
    return cls(model, args=settings(folder, config, **(options or {})), train_dataset=ROWS, **arguments)


def logs(made):
    made.train()
    return [row for row in made.state.log_history if "loss" in row]


def test_every_metric_of_the_stock_trainer_is_logged_and_ours_beside_it(tmp_path):
    stock, ours = logs(trainer(tmp_path, trl.GRPOTrainer)), logs(trainer(tmp_path))
    assert stock[0].keys() <= ours[0].keys()
    for name in (
        "sampling/importance_sampling_ratio/mean",
        "sampling/surprisal_minus_entropy/mean",
        "rollout/acceptance_rate",
        "rollout/tokens_per_forward",
        "rollout/generated_tok_s",
        "rollout/duration_s",
        "rollout/weight_version",
        "rollout/plan/two_forward(8)",
        "rollout_corr/rollout_is_mean",
        "rollout_corr/kl",
        "perf/weight_sync_s",
    ):
        assert math.isfinite(ours[0][name]), name
    assert [row["rollout/weight_version"] for row in ours] == [0, 1]


def test_lossless_rollouts_are_the_learners_own_law_at_every_version(tmp_path):
    rows = logs(trainer(tmp_path, options={"max_steps": 3, "per_device_train_batch_size": 32}))
    for row in rows:
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
        assert row["rollout_corr/rollout_is_max"] == pytest.approx(1, abs=1e-3)
        assert row["sampling/sampling_logp_difference/max"] < 1e-3
    gap = rows[-1]["sampling/surprisal_minus_entropy/run_mean"]
    assert abs(gap) < 4 * rows[-1]["sampling/surprisal_minus_entropy/run_se"]


def test_mixed_precision_draws_the_law_that_the_learner_computes_in_it(tmp_path):
    """TRL's own default: float32 weights, and a forward in bfloat16."""
    made = trainer(tmp_path, options={"bf16": True}, rollout=RolloutConfig(plan="two_forward", audit="all"))
    assert made.model.dtype == torch.float32
    for row in logs(made):
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=0.1)
        assert row["sampling/sampling_logp_difference/mean"] < 0.02
    first = HFPolicy.from_pretrained("tiny")
    audit = audit_files(tmp_path / "blockroll" / "audit")
    report = check_audit(audit, policy_of=lambda version: None if version else first)
    assert report.passed, report.problem
    assert report.recomputed == {0: report.rows_by_version[0]}


def test_a_wrong_logprob_is_seen_before_truncation_hides_it(tmp_path):
    made = trainer(tmp_path)
    generate = made.rollouts.generate

    def shifted(**arguments):
        done = generate(**arguments)
        return done._replace(logprobs=[[[lp - 0.3] for (lp,) in row] for row in done.logprobs])

    made.rollouts.generate = shifted
    row = logs(made)[0]
    assert row["rollout_corr/rollout_is_mean"] == pytest.approx(math.exp(0.3), abs=1e-3)
    assert row["rollout_corr/kl"] == pytest.approx(-0.3, abs=1e-3)
    # After TRL's truncation by sequence nothing is left but zeros.
    assert row["sampling/importance_sampling_ratio/mean"] == 0
    assert row["grad_norm"] == 0


def test_a_wrong_sampler_that_reports_the_policys_logprobs_is_seen_in_surprisal(tmp_path):
    made = trainer(tmp_path, options={"per_device_train_batch_size": 64})
    made.rollouts.sampling = dataclasses.replace(made.rollouts.sampling, temperature=1.6)
    generate = made.rollouts.generate

    def reporting_the_policy(**arguments):
        done = generate(**arguments)
        return done._replace(logprobs=[[[math.nan] for _ in row] for row in done.logprobs])

    made.rollouts.generate = reporting_the_policy
    row = logs(made)[0]
    assert row["sampling/importance_sampling_ratio/mean"] == 1
    assert row["sampling/surprisal_minus_entropy/mean"] > 4 * row["sampling/surprisal_minus_entropy/se"]


def test_the_replica_holds_the_trainers_own_tensors_and_leaves_its_model_as_it_was(tmp_path):
    made = trainer(tmp_path)
    mine = dict(made.rollouts.placement.policy.model.named_parameters())
    for name, parameter in made.model.named_parameters():
        assert mine[name] is parameter
    made.train()
    assert made.model.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad for parameter in made.model.parameters())
    assert not made.rollouts.placement.policy.model.training


@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
def test_iterations_accumulation_and_evaluation_work_as_in_the_stock_trainer(tmp_path, cls):
    made = trainer(
        tmp_path,
        cls,
        options={
            "num_iterations": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "per_device_eval_batch_size": 16,
        },
        eval_dataset=ROWS.select(range(8)),
    )
    rows = logs(made)
    generated = [row for row in rows if "rollout/duration_s" in row]
    assert [row["rollout/weight_version"] for row in generated] == [0, 2]
    # Only before the first update are the weights those that drew the tokens.
    assert ["sampling/surprisal_minus_entropy/mean" in row for row in rows] == [True, False, True, False]
    evaluation = next(row for row in made.state.log_history if "eval_reward" in row)
    assert 0 <= evaluation["eval_reward"] <= 1
    assert evaluation["eval_rollout/acceptance_rate"] > 0


def test_a_lora_policy_is_decoded_merged_and_its_base_does_not_change(tmp_path):
    made = trainer(
        tmp_path,
        options={"learning_rate": 1e-2, "max_steps": 3},
        peft_config=LoraConfig(
            r=4, target_modules=["q_proj", "v_proj", "down_proj"], modules_to_save=["norm"]
        ),
    )
    base = {
        name: parameter.detach().clone()
        for name, parameter in made.model.named_parameters()
        if "base_layer" in name
    }
    rows = logs(made)
    assert max(row["rollout_corr/rollout_is_max"] for row in rows) == pytest.approx(1, abs=1e-3)
    assert all(
        torch.equal(dict(made.model.named_parameters())[name], before) for name, before in base.items()
    )
    moved = dict(made.rollouts.placement.policy.model.named_parameters())[
        "model.layers.0.self_attn.q_proj.weight"
    ]
    stock = next(value for name, value in base.items() if "layers.0.self_attn.q_proj" in name)
    assert not torch.equal(moved, stock)


def test_equal_seeds_give_equal_runs_and_other_seeds_other_tokens(tmp_path):
    first, again, other = (logs(trainer(tmp_path, options={"seed": seed})) for seed in (3, 3, 4))
    same = ("completions/mean_length", "reward", "entropy", "rollout/acceptance_rate")
    assert [[row[name] for name in same] for row in first] == [[row[name] for name in same] for row in again]
    assert first[0]["entropy"] != other[0]["entropy"]


def test_the_mixed_law_warns_of_trls_default_and_is_corrected_by_token(tmp_path):
    mixed = RolloutConfig(plan="two_forward", mix_weight=0.5)
    with pytest.warns(UserWarning, match="token_truncate"):
        trainer(tmp_path, rollout=mixed)
    made = trainer(tmp_path, rollout=mixed, options={"vllm_importance_sampling_mode": "token_truncate"})
    row = logs(made)[0]
    assert row["rollout_corr/rollout_is_std"] > 0.01
    assert row["rollout_corr/rollout_is_mean"] == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("cls", "options", "arguments", "advice"),
    [
        (GRPOTrainer, {"use_vllm": True}, {}, "leave use_vllm out"),
        (GRPOTrainer, {"top_p": 0.9}, {}, "vllm_importance_sampling_correction=False"),
        (GRPOTrainer, {"top_k": 5}, {}, "vllm_importance_sampling_correction=False"),
        (GRPOTrainer, {"loss_type": "vespo"}, {}, "token_truncate"),
        (GRPOTrainer, {"generation_kwargs": {"do_sample": False}}, {}, "generation_kwargs"),
        (GRPOTrainer, {}, {"rollout": RolloutConfig(temperature=0.5)}, "temperature=1.0"),
        (GRPOTrainer, {}, {"rollout": RolloutConfig(max_tokens=9)}, "max_completion_length=48"),
        (RLOOTrainer, {}, {"rollout": RolloutConfig(mix_weight=0.5)}, "RLOO has no importance-sampling"),
    ],
)
def test_what_would_bias_training_is_refused_with_advice(tmp_path, cls, options, arguments, advice):
    with pytest.raises(InvalidInput, match=advice):
        trainer(tmp_path, cls, options=options, **arguments)


def test_truncation_is_served_when_the_correction_is_off(tmp_path):
    made = trainer(tmp_path, options={"top_k": 5, "vllm_importance_sampling_correction": False})
    row = logs(made)[0]
    assert "rollout/acceptance_rate" in row
    assert "rollout_corr/kl" not in row


def test_another_family_is_named_with_the_way_to_check_it(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=16, n_layer=1, n_head=2, n_positions=128))
    with pytest.raises(InvalidInput, match=r"'gpt2' is not supported.*blockroll doctor --model"):
        trainer(tmp_path, model=model, processing_class=load_tokenizer("tiny"))


def test_weights_that_are_not_finite_end_the_step_by_name(tmp_path):
    made = trainer(tmp_path)
    with torch.no_grad():
        next(made.model.parameters()).fill_(math.nan)
    with pytest.raises(ReplicaError, match=r"request train-0-0-0-0 of step 0 .*NonFiniteLogits"):
        made.train()


def test_a_rollout_func_serves_the_stock_trainer(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    with RolloutPool.from_pretrained("tiny", plan="two_forward") as pool:
        made = trainer(tmp_path, trl.GRPOTrainer, rollout_func=make_rollout_func(pool))
        rows = logs(made)
        assert pool.version == 1
    assert [row["rollout/tokens_per_forward"] > 1.5 for row in rows] == [True, True]
    assert not any(name.startswith("sampling/") for name in rows[0])


def test_a_pool_of_the_scripts_own_gets_every_version(tmp_path):
    with RolloutPool.from_pretrained("tiny", plan="plain") as pool:
        rows = logs(trainer(tmp_path, rollout=pool))
        assert pool.version == 1
        assert next(pool.generate(pool.requests(["1+1=?\n"])))
    assert max(row["rollout_corr/rollout_is_max"] for row in rows) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("version", ["1.15.2", "1.17.0", "2.0"])
def test_another_trl_is_refused_by_range(version):
    with pytest.raises(MissingDependency, match=r"trl>=1\.16,<1\.17, installed is " + version):
        require_tested(version)


def test_a_trainer_that_lacks_a_part_is_refused_by_its_name(tmp_path):
    made = trainer(tmp_path)
    require_parts(made, ["eos_token_ids"])
    with pytest.raises(MissingDependency, match="GRPOTrainer without _renamed"):
        require_parts(made, ["eos_token_ids", "_renamed"])


def test_truncated_rows_are_refused_as_config_errors(tmp_path):
    with pytest.raises(ConfigError):
        trainer(tmp_path, options={"min_p": 0.1})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_shell_on_shared_weights_decodes_what_the_model_computes(family, tied):
    model = random_model(family)
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = tied
    model = type(model)(config).eval()
    policy = sharing_policy(model, None)
    assert sum(1 for _ in policy.model.parameters()) == sum(1 for _ in model.parameters())
    assert {id(each) for each in policy.model.parameters()} == {id(each) for each in model.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)  # as an optimizer would
    ids = torch.tensor([[5, 9, 4, 11, 7]])
    cache = SlotCache(policy, num_slots=1, capacity=16)
    want = model(ids, use_cache=False).logits
    got = policy.verify_logits(ids, cache.window(0, 1, 5))
    assert torch.allclose(got, want, atol=2e-5)


def aligned(folder, *, alignment=None, **options):
    """A trainer of the tiny policy that learns to draft by an adapter of its own, from nothing."""
    draft = DraftConfig(rank=4, block_sizes=(4,), layouts=("two_forward",), learning_rate=3e-3)
    return trainer(
        folder,
        rollout=RolloutConfig(plan="two_forward(4)"),
        alignment=alignment or AlignmentConfig(draft=draft),
        options={"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **options},
    )


def test_alignment_trains_the_adapter_after_each_update_and_never_the_policy(tmp_path):
    made = aligned(tmp_path, learning_rate=0.0)
    before = {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}
    adapter = made.rollouts.placement.policy.adapter
    drafts = [parameter.detach().clone() for parameter in adapter.parameters()]
    rows = logs(made)
    assert all(torch.equal(dict(made.model.named_parameters())[name], old) for name, old in before.items())
    assert not any(
        torch.equal(old, new)
        for old, new in zip(drafts, adapter.parameters(), strict=True)
        if new.abs().sum() > 0
    )
    assert [row["draft/num_steps"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["draft/loss"] < rows[0]["draft/loss"]


def test_completions_of_one_token_train_the_policy_and_have_nothing_to_draft(tmp_path):
    rows = logs(aligned(tmp_path, max_completion_length=1))
    for row in rows:
        assert row["completions/max_length"] == 1
        assert math.isfinite(row["loss"])
        assert row["rollout_corr/rollout_is_max"] == pytest.approx(1, abs=1e-3)
        assert not any(name.startswith("draft/") for name in row)


def test_alignment_by_acceptance_waits_until_acceptance_falls(tmp_path):
    made = aligned(
        tmp_path, alignment=AlignmentConfig(below=0.9, draft=DraftConfig(rank=4, block_sizes=(4,)))
    )
    alignment = made.rollouts.placement.alignment
    alignment.first_acceptance, alignment._acceptance = 0.5, 0.46
    assert not alignment.is_due(1)
    alignment._acceptance = 0.44
    assert alignment.is_due(1)


def test_a_full_conversion_reports_how_its_gradient_lies_to_the_policys(tmp_path):
    draft = DraftConfig(conversion="full", block_sizes=(8,), layouts=("two_forward",), learning_rate=1e-5)
    made = aligned(tmp_path, alignment=AlignmentConfig(every=2, draft=draft))
    rows = logs(made)
    assert ["draft/policy_grad_cosine" in row for row in rows] == [False, True, False, True]
    assert all(-1 <= row.get("draft/policy_grad_cosine", 0) <= 1 for row in rows)
    assert ["draft/policy_kl" in row for row in rows] == [False, True, False, True]
    assert all(0 < abs(row.get("draft/policy_kl", 1e-6)) < 0.1 for row in rows)
    # The draft gradient does not leak into the next update of the policy.
    assert all(row["rollout_corr/rollout_is_max"] == pytest.approx(1, abs=1e-3) for row in rows)


def test_a_resumed_run_draws_what_the_uninterrupted_one_draws(tmp_path):
    def drawing(made):
        drawn = {}
        generate = made.rollouts.generate

        def recording(**arguments):
            done = generate(**arguments)
            drawn[made.state.global_step] = done.completion_ids
            return done

        made.rollouts.generate = recording
        return drawn

    whole = aligned(tmp_path / "whole")
    want = drawing(whole)
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-2"
    assert {path.name for path in (folder / "blockroll").iterdir()} == {
        "draft_adapter.json",
        "draft_adapter.safetensors",
        "rollout_state.pt",
    }
    resumed = aligned(tmp_path / "resumed")
    got = drawing(resumed)
    resumed.train(resume_from_checkpoint=str(folder))
    assert sorted(got) == [2, 3]
    assert got == {step: want[step] for step in (2, 3)}
    mine, theirs = (made.rollouts.placement.policy.adapter for made in (resumed, whole))
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))


def test_alignment_cannot_go_on_from_a_stock_trainers_checkpoint(tmp_path):
    stock = trainer(
        tmp_path, trl.GRPOTrainer, options={"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    )
    stock.train()
    with pytest.raises(CheckpointError, match="written without blockroll"):
        aligned(tmp_path / "other").train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_an_adapter_of_another_architecture_is_refused_and_one_beside_the_model_is_used(tmp_path):
    other = adapted_policy()
    other.adapter.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterMismatch):
        trainer(tmp_path, adapter=tmp_path / "other")


def test_the_output_folder_holds_every_logged_step_and_a_page(tmp_path):
    trainer(tmp_path).train()
    lines = read_lines(tmp_path / "blockroll" / "metrics.jsonl")
    assert [row["step"] for row in lines if "reward" in row] == [1, 2]
    page = (tmp_path / "blockroll" / "report.html").read_text()
    assert "GRPOTrainer on" in page
    assert "Reward against acceptance" in page


def test_the_audit_of_a_trainers_rollouts_lies_beside_its_report_and_passes(tmp_path):
    config = RolloutConfig(plan="two_forward", audit="all")
    made = trainer(tmp_path, rollout=config, options={"save_strategy": "steps", "save_steps": 1})
    made.train()
    audit = tmp_path / "blockroll" / "audit"
    report = check_audit(audit_files(audit))
    assert report.passed, report.problem
    assert report.num_rows > 500
    assert {path.name[:14] for path in audit.iterdir()} == {"version-000000", "version-000001"}
    assert not [path for path in audit.iterdir() if "version-000002" in path.name]
    (audit / "version-000002-replica-0-00001.parquet").touch()  # of a version that is made again
    resumed = trainer(tmp_path, rollout=config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    again = check_audit(audit_files(audit))
    assert again.passed, again.problem
    # Version 1 drew the last step twice, before the interruption and after it.
    assert again.rows_by_version[0] == report.rows_by_version[0]
    assert again.rows_by_version[1] == 2 * report.rows_by_version[1]


def test_a_later_turn_stays_in_its_group_and_computes_only_what_is_new(tmp_path):
    rollouts = trainer(tmp_path).rollouts
    rollouts.sync_weights()
    rollouts.begin_round()
    encode = load_tokenizer("tiny")
    prompts = [encode(problem.prompt)["input_ids"] for problem in PROBLEMS[:2] for _ in range(2)]
    done = rollouts.generate(prompts, None, 2, nullcontext())
    texts = [
        [*prompt, *ids, 50, 51] for prompt, ids in zip(done.prompt_ids, done.completion_ids, strict=True)
    ]
    rollouts.generate(texts[::-1], None, 1, nullcontext())
    first, later = rollouts.rollouts[:4], rollouts.rollouts[4:]
    groups = [rollout.request.group_id for rollout in first]
    assert len(set(groups)) == 2
    assert [rollout.request.group_id for rollout in later] == groups[::-1]
    assert {rollout.stats.num_prefilled for rollout in later} == {2}
