"""A short form of the experiments on learning."""

from benchmarks import learning


def test_learning_runs_go_on_from_their_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "RUNS", tmp_path)
    rows = learning.by_plan(seeds=(0,), stages=(1,), prompts_per_step=2)
    assert [(row["plan_config"], row["step"]) for row in rows] == [("plain", 1), ("two_forward", 1)]
    rows = learning.by_plan(seeds=(0,), stages=(1, 2), prompts_per_step=2)
    assert [(row["plan_config"], row["step"]) for row in rows] == [
        ("plain", 1),
        ("plain", 2),
        ("two_forward", 1),
        ("two_forward", 2),
    ]


def test_every_variant_learns_from_the_law_it_was_drawn_from(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "RUNS", tmp_path)
    rows = learning.by_law(adapter, seeds=(0,), steps=1, prompts_per_step=2, held_out=4, eval_prompts=4)
    assert [row["variant"] for row in rows if "held_out_reward" in row] == list(learning.VARIANTS)
    by_variant = {row["variant"]: row for row in rows if "step" in row}
    assert list(by_variant) == list(learning.VARIANTS)
    for variant, row in by_variant.items():
        is_mixed = variant.startswith("mixed")
        assert (row["rollout/effective_sample_size"] < 1 - 1e-6) <= is_mixed
    assert by_variant["lossless"]["policy_version"] == 0
