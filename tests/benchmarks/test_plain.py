"""Plain steps are timed in pairs, of the same prompts, with every ratio beside its range."""

from benchmarks import plain
from blockroll.policies.hf import HFPolicy


def test_a_row_has_the_time_of_each_and_ratios_with_their_range():
    ordinary, packed = (HFPolicy.from_pretrained("tiny", prepack=prepack) for prepack in ("off", "on"))
    row = plain.measured(ordinary, packed, batch=2, pairs=2, tokens=3)
    assert (row["dtype"], row["batch"], row["pairs"]) == ("float32", 2, 2)
    assert all(row[f"{name}_cpu_ms"] > 0 for name in ("ordinary", "packed", "generate"))
    for key in ("packed_to_ordinary", "packed_to_generate", "ordinary_to_generate"):
        assert row[f"{key}_low"] <= row[key] <= row[f"{key}_high"]
    assert row["packed_mb"] > 0
    assert ordinary.packed.num_bytes == 0
    assert ordinary.model.config._attn_implementation == "blockroll"
