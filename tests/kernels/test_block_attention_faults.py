"""Faults planted in the source of `block_attention`'s kernels, each of which the comparison by hand finds."""

import pytest

from blockroll.kernels.block_attention import fused, fused_prefix, fused_softmax, fused_tail
from blockroll.policies.layout import causal_rows, fused_rows
from tests.kernels.planted import planted
from tests.kernels.test_block_attention_fused import assert_near, attended, by_hand, drawn

CHUNKS, HEADS, NEGATIVE, WINDOW = "chunks", "heads", "negative lengths", "window"
FAULTS = {
    "a block sees a draft more": (
        fused_tail,
        "(is_block, num_behind, tl.max",
        "(is_block, num_behind + 1, tl.max",
    ),
    "a verify row sees the next": (
        fused_tail,
        "num_clean + width, own_row_M)",
        "num_clean + width, own_row_M + 1)",
    ),
    "a verify row sees a proposal": (
        fused_tail,
        "tl.max(own_row_M, 0) + 1)\n    last_seen_M = tl.where(is_block, num_clean + width, own_row_M)",
        "num_clean + width)\n    last_seen_M = num_clean + width + 0 * own_row_M",
    ),
    "a block sees itself backwards alone": (
        fused_tail,
        "num_clean + width, own_row_M)",
        "own_row_M, own_row_M)",
    ),
    "chunks are merged as they are": (
        fused_tail,
        "out_MD * kept_M[:, None] + part_MD",
        "out_MD + part_MD",
        CHUNKS,
    ),
    "the last chunk is left out": (fused_tail, "(length, 0) + chunk_rows - 1)", "(length, 0))"),
    "tiles are added as they are": (fused_softmax, "out * kept[:, None]", "out"),
    "the last row of a chunk counts twice": (fused_prefix, "key_N < stop, 0.0", "key_N <= stop, 0.0"),
    "a row behind a prefix is seen": (
        fused_prefix,
        "first_key + chunk_rows, length)",
        "first_key + chunk_rows, length + 1)",
    ),
    "heads of a key head are those of another": (
        fused_prefix,
        "head * repeats + place_M % repeats",
        "place_M % repeats * num_key_heads + head",
        HEADS,
    ),
    "a window is a key wider over a prefix": (fused_prefix, "- window + 1", "- window", WINDOW),
    "a window is a key wider over new rows": (
        fused_tail,
        "num_behind, 0) - window + 1",
        "num_behind, 0) - window",
        WINDOW,
    ),
    "rows before a text are seen": (
        fused_tail,
        "tl.maximum(-length, 0)",
        "tl.maximum(0 * length, 0)",
        NEGATIVE,
    ),
}


def compared(case=None):
    layout, lengths, options = fused_rows(2, (0, 2)), (257,), {}
    if case == CHUNKS:
        lengths = (700,)
    if case == WINDOW:
        options = {"sliding_window": 3}
    if case == NEGATIVE:
        layout, lengths = causal_rows(6), (-4, 0)
    given = drawn(layout, heads=(4, 2) if case == HEADS else (2, 1), lengths=lengths)
    found = attended(given, layout, lengths, size=64, **options)
    assert_near(found, by_hand(given, layout, lengths, **options))


@pytest.mark.parametrize("case", [None, CHUNKS, HEADS, NEGATIVE, WINDOW])
def test_without_a_fault_nothing_is_found(case):
    compared(case)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name, tmp_path, monkeypatch):
    module, right, wrong, *case = FAULTS[name]
    made = planted(tmp_path, module, right, wrong)
    for user in (fused, fused_prefix, fused_tail):
        for kernel in ("prefix_stage", "tail_stage", "added"):
            if hasattr(user, kernel) and hasattr(made, kernel):
                monkeypatch.setattr(user, kernel, getattr(made, kernel))
    with pytest.raises(AssertionError, match="assert"):
        compared(*case)
