"""What steps are predicted to cost, from steps that were measured; no test reads a clock."""

import itertools
import random

import pytest

from blockroll.rollout.planning.costs import CostModel, Work
from blockroll.types import PLAIN, Plan

LOOKED_UP = tuple(Plan(size, drafter="history") for size in (1, 2, 4, 8, 16))
TWO_8 = Plan(8)


def seconds(work):
    """A forward, requests in it, rows, and rows over their context; draft forwards cost a tenth more."""
    forwards = work.forwards * (6 + 0.1 * work.batch_size)
    extra = 1.1 if work.forwards > 1 else 1.0
    return 1e-3 * extra * (forwards + 0.14 * work.rows * (1 + work.context / 2048))


def ratio(work):
    return seconds(work) / seconds(work.plain)


def measured(model, plans, *, batches=(1, 8, 32), contexts=(64,), steps=120, noise=0.0, slow=lambda: 1.0):
    """Plain steps with steps of these plans among them."""
    rng = random.Random(0)
    for batch_size, context in itertools.product(batches, contexts):
        for index in range(steps):
            plan = plans[index // 2 % len(plans)] if index % 2 else PLAIN
            work = Work.of(plan, batch_size, context)
            model.observe(work, seconds(work) * rng.uniform(1, 1 + noise) * slow())
    return model


def test_plain_costs_one_and_what_was_measured_costs_what_it_took():
    model = measured(CostModel(), [*LOOKED_UP, TWO_8])
    for batch_size in (1, 8, 32):
        assert model.cost(Work.of(PLAIN, batch_size, 64)) == 1
        for plan in (*LOOKED_UP, TWO_8):
            work = Work.of(plan, batch_size, 64)
            assert model.cost(work) == pytest.approx(ratio(work), rel=0.05)


@pytest.mark.parametrize(("batch_size", "context"), [(2, 64), (16, 64), (64, 64), (8, 1024), (1, 2048)])
def test_the_line_predicts_batches_contexts_and_plans_never_measured(batch_size, context):
    model = measured(CostModel(), [LOOKED_UP[1], LOOKED_UP[3]], contexts=(64, 512))
    for plan in LOOKED_UP:
        work = Work.of(plan, batch_size, context)
        assert model.num_samples(work) == 0 or context == 64
        assert model.cost(work) == pytest.approx(ratio(work), rel=0.2)


def test_a_few_steps_give_a_prediction():
    model = measured(CostModel(), [LOOKED_UP[2]], batches=(8,), steps=8)
    work = Work.of(LOOKED_UP[2], 8, 64)
    assert model.cost(work) == pytest.approx(ratio(work), rel=0.15)


@pytest.mark.parametrize("phase", [37, 400])
def test_a_machine_that_slows_down_and_slow_single_steps_change_little(phase):
    rng, steps = random.Random(1), itertools.count()

    def slow():
        return (3 if next(steps) // phase % 2 else 1) * (5 if rng.random() < 0.03 else 1)

    model = measured(CostModel(), [*LOOKED_UP, TWO_8], steps=400, noise=0.2, slow=slow)
    for batch_size, plan in itertools.product((1, 8, 32), (*LOOKED_UP, TWO_8)):
        work = Work.of(plan, batch_size, 64)
        assert model.cost(work) == pytest.approx(ratio(work), rel=0.2)


def test_steps_among_their_likes_teach_nothing():
    model = measured(CostModel(), LOOKED_UP, batches=(8,))
    work = Work.of(LOOKED_UP[2], 8, 64)
    before = model.cost(work)
    for index in range(2000):
        model.observe(work, seconds(work) * (1 + index / 500))
    assert model.cost(work) == pytest.approx(before, rel=0.1)


def test_the_speed_of_plain_steps_is_known_while_others_run():
    model = measured(CostModel(), LOOKED_UP, batches=(8,))
    assert CostModel().plain_seconds() is None
    work = Work.of(LOOKED_UP[3], 8, 64)
    for _ in range(20):
        model.observe(work, 3 * seconds(work))
    assert model.plain_seconds() == pytest.approx(3 * seconds(work.plain), rel=0.1)


def test_costs_outlive_the_process(tmp_path):
    path = tmp_path / "deep" / "costs.json"
    model = measured(CostModel.load(path), [*LOOKED_UP, TWO_8])
    model.save()
    assert [file.name for file in path.parent.iterdir()] == ["costs.json"]
    again = CostModel.load(path)
    for plan, batch_size in itertools.product((*LOOKED_UP, TWO_8), (1, 4, 32)):
        work = Work.of(plan, batch_size, 64)
        assert again.cost(work) == pytest.approx(model.cost(work), rel=0.1)
        assert again.num_samples(work) == model.num_samples(work)


def test_the_first_measured_step_is_kept_at_once(tmp_path):
    path = tmp_path / "costs.json"
    model = CostModel.load(path)
    plain, drafted = Work.of(PLAIN, 8, 64), Work.of(TWO_8, 8, 64)
    for work in (plain, plain, drafted, plain):  # the first of a place warms it up
        model.observe(work, 1e-3)
    assert not path.exists()
    model.observe(drafted, 4e-3)
    assert CostModel.load(path).num_samples(drafted) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"plain_steps_per_step": [["verify", 1, 8]]}',
        '{"plain_steps_per_step": [["verify", 1, 8, 16, 64, -0.1]]}',
        '{"plain_steps_per_step": [["verify", 1, 8, 16, 64, NaN]]}',
        '{"plain_steps_per_step": [["verify", 1, 8, 16, 64, "0.1"]]}',
        '{"plain_steps_per_step": [["verify", 1, 0, 16, 64, 1.5]]}',
        '{"plain_steps_per_step": [["verify", 1, 8.5, 16, 64, 1.5]]}',
        '{"plain_steps_per_step": [[7, 1, 8, 16, 64, 1.5]]}',
        '{"plain_steps_per_step": {"two_forward(8)": {"1x64": [0.1]}}}',
    ],
)
def test_a_damaged_file_is_ignored_with_a_warning_that_names_it(tmp_path, caplog, text):
    path = tmp_path / "costs.json"
    path.write_text(text)
    model = CostModel.load(path)
    assert str(path) in caplog.text
    assert model.num_samples(Work.of(TWO_8, 8, 64)) == 0
    measured(model, [TWO_8], batches=(8,)).save()
    assert CostModel.load(path).num_samples(Work.of(TWO_8, 8, 64)) > 0


def test_a_model_that_cannot_be_written_is_kept_in_memory(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    model = measured(CostModel(tmp_path / "file" / "costs.json"), [TWO_8], batches=(8,))
    model.save()
    model.save()
    assert caplog.text.count("cannot be written") == 1
    assert model.num_samples(Work.of(TWO_8, 8, 64)) > 0


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_step_that_took_no_time_is_no_measurement(seconds):
    model = CostModel()
    for _ in range(3):
        model.observe(Work.of(PLAIN, 8, 64), seconds)
    assert model.plain_seconds() is None


def test_places_hold_steps_of_about_equal_cost():
    assert Work.of(PLAIN, 1, 1).place == Work("verify", 1, 1, 1, 64)
    assert Work.of(PLAIN, 7, 100).place == Work.of(PLAIN, 8, 128).place
    assert Work.of(PLAIN, 8, 128).place != Work.of(PLAIN, 9, 128).place
