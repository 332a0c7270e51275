"""A TRL trainer's weights and those that generate: shared, sent, and told apart by what they are."""

import copy

import pytest
import torch
import trl

from blockroll.config import RolloutConfig
from blockroll.errors import WeightSyncError
from blockroll.rl_loops.trl import make_rollout_func
from blockroll.rl_loops.trl.fingerprint import fingerprint
from blockroll.rl_loops.trl.weights import sharing_policy
from blockroll.rollout.engine.cache.slots import SlotCache
from blockroll.rollout.pool.pool import RolloutPool
from tests.models import FAMILIES, random_model
from tests.trl_trainers import BEST_OF_EVERY_STEP, ROWS, even_share, logs, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning",  # what TRL itself calls
)


def test_the_replica_holds_the_trainers_own_tensors_and_leaves_its_model_as_it_was(tmp_path):
    made = trainer(tmp_path)
    mine = dict(made.rollouts.placement.policy.model.named_parameters())
    for name, parameter in made.model.named_parameters():
        assert mine[name] is parameter
    made.train()
    assert made.model.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad for parameter in made.model.parameters())
    assert not made.rollouts.placement.policy.model.training


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


def test_a_pool_of_the_scripts_own_gets_every_version(tmp_path):
    with RolloutPool.from_pretrained("tiny", plan="plain") as pool:
        rows = logs(trainer(tmp_path, rollout=pool, reward_funcs=even_share))
        assert pool.version == 1
        assert next(pool.generate(pool.requests(["1+1=?\n"])))
    assert max(row["rollout_corr/rollout_is_max"] for row in rows) == pytest.approx(1, abs=1e-3)


def test_a_rollout_func_serves_the_stock_trainer(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    with RolloutPool.from_pretrained("tiny", plan="two_forward") as pool:
        made = trainer(tmp_path, trl.GRPOTrainer, rollout_func=make_rollout_func(pool))
        rows = logs(made)
        assert pool.version == 1
    assert [row["rollout/tokens_per_forward"] > 1.5 for row in rows] == [True, True]
    assert not any(name.startswith("sampling/") for name in rows[0])


def versions(made, prefix=""):
    return [row[f"{prefix}rollout/weight_version"] for row in made.state.log_history if "reward" in row]


def are_on_policy(rows):
    ratios = [row["rollout_corr/rollout_is_max"] for row in rows] + [
        row["rollout_corr/rollout_is_min"] for row in rows
    ]
    return ratios == pytest.approx([1] * len(ratios), abs=1e-3)


@pytest.mark.slow
def test_training_again_goes_on_from_the_pools_own_version(tmp_path):
    with RolloutPool.from_pretrained("tiny", plan="plain") as pool:
        made = trainer(tmp_path, rollout=pool, reward_funcs=even_share)
        first, again = logs(made), logs(made)
        assert [row["rollout/weight_version"] for row in first + again[-2:]] == [0, 1, 2, 3]
        assert are_on_policy(first + again)


def test_two_trainers_on_one_pool_take_turns_and_each_draws_from_its_own_policy(tmp_path):
    with RolloutPool.from_pretrained("tiny", plan="plain") as pool:
        first = trainer(tmp_path / "first", rollout=pool, reward_funcs=even_share, options={"max_steps": 1})
        second = trainer(tmp_path / "second", rollout=pool, reward_funcs=even_share, options={"max_steps": 1})
        rows = [*logs(first), *logs(second), *logs(first)[-1:], *logs(second)[-1:]]
        assert [row["rollout/weight_version"] for row in rows] == [0, 0, 1, 2]
        assert are_on_policy(rows)


def evaluated(made):
    made.evaluate()
    row = made.state.log_history[-1]
    assert row["eval_rollout_corr/rollout_is_max"] == pytest.approx(1, abs=1e-3)
    return row["eval_rollout/weight_version"]


def test_weights_that_a_script_changes_between_calls_are_a_version_of_their_own(tmp_path):
    made = trainer(
        tmp_path,
        rollout=RolloutConfig(plan="plain"),
        reward_funcs=even_share,
        eval_dataset=ROWS.select(range(4)),
        options={"per_device_eval_batch_size": 16, "eval_strategy": "no"},
    )
    assert [evaluated(made), evaluated(made)] == [0, 0]
    with torch.no_grad():
        made.model.lm_head.weight.data.mul_(1.5)  # torch counts no write that goes through .data
    assert evaluated(made) == 1
    made.model.model.norm.weight = torch.nn.Parameter(made.model.model.norm.weight.detach() * 1.1)
    assert evaluated(made) == 2  # a parameter in another's place
    made.train()
    assert versions(made) == [2, 3]
    assert evaluated(made) == 4


@pytest.mark.slow
def test_evaluation_after_the_best_model_was_loaded_draws_from_the_best_model(tmp_path):
    with RolloutPool.from_pretrained("tiny", plan="plain") as pool:
        made = trainer(
            tmp_path,
            rollout=pool,
            reward_funcs=lambda completions, **_: [-float(made.state.global_step) for _ in completions],
            eval_dataset=ROWS.select(range(4)),
            options={
                **BEST_OF_EVERY_STEP,
                "metric_for_best_model": "eval_reward",
                "greater_is_better": True,
                "per_device_eval_batch_size": 16,
            },
        )
        made.train()
        assert made.state.best_model_checkpoint.endswith("checkpoint-1")
        last = pool.version
        assert evaluated(made) == last + 1


def test_taking_equal_steps_for_equal_weights_is_caught(tmp_path, monkeypatch):
    """Planted: the rule that weights stand still while the trainer's step does."""
    with RolloutPool.from_pretrained("tiny", plan="plain") as pool:
        made = trainer(
            tmp_path,
            rollout=pool,
            eval_dataset=ROWS.select(range(4)),
            options={"per_device_eval_batch_size": 16},
        )
        monkeypatch.setattr(made.rollouts.placement, "fingerprint", lambda: (made.state.global_step,))
        evaluated(made)
        with torch.no_grad():
            made.model.lm_head.weight.mul_(1.5)
        with pytest.raises(WeightSyncError, match="not the one that is trained"):
            evaluated(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fingerprint_sees_every_write(dtype):
    model = torch.nn.ModuleList([torch.nn.Linear(1030, 9), torch.nn.Linear(3, 1)]).to(dtype)
    seen = [fingerprint(model)]
    assert fingerprint(model) == seen[0]
    model[0].weight.data[4, 7] += 0.1
    seen.append(fingerprint(model))
    model[0].weight.data[[1, 2]] = model[0].weight.data[[2, 1]]
    seen.append(fingerprint(model))
    model[0].weight.data[:, [1, 2]] = model[0].weight.data[:, [2, 1]]
    seen.append(fingerprint(model))
    model[1].bias.data[0] += 0.1
    seen.append(fingerprint(model))
    assert len(set(seen)) == 5
