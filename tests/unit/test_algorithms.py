"""The table of algorithms, and that the loop goes through their phases."""

import typing

from blockroll.config import TrainConfig
from blockroll.rl_loops.algorithms import ALGORITHMS, GRPO
from tests.runs import TASK, config_for, run


def test_the_table_holds_just_what_the_config_allows():
    allowed = typing.get_args(typing.get_type_hints(TrainConfig)["algorithm"])
    assert sorted(ALGORITHMS) == sorted(allowed)
    assert all(algorithm.name == name for name, algorithm in ALGORITHMS.items())


def test_the_loop_asks_for_every_phase_in_its_order(tmp_path, policy_path, monkeypatch):
    phases = []
    for name in ("score", "advantages", "loss"):
        phase = getattr(GRPO, name)

        def noting(*arguments, name=name, phase=phase, **options):
            phases.append(name)
            return phase(*arguments, **options)

        monkeypatch.setattr(GRPO, name, noting)
    run(config_for(tmp_path, policy_path, plan="plain", steps=1, eval_every=0), task=TASK)
    assert phases == ["score", "advantages", "loss"]
