"""Faults planted in the source of `block_attention`'s kernels, each of which the comparison by hand finds."""

import importlib.util
from pathlib import Path

import pytest

from blockroll.kernels.block_attention import fused, fused_prefix, fused_softmax, fused_tail
from blockroll.policies.layout import causal_rows, fused_rows
from tests.kernels.test_block_attention_fused import assert_near, attended, by_hand, drawn

USERS = (fused, fused_prefix, fused_tail)
CHUNKS, HEADS, NEGATIVE, WINDOW = "chunks", "heads", "negative lengths", "window"
FAULTS = {
    "a block sees a draft more": (
        fused_tail,
        [("(is_block, num_behind, tl.max", "(is_block, num_behind + 1, tl.max")],
    ),
    "a verify row sees the next": (
        fused_tail,
        [("num_clean + width, own_row_M)", "num_clean + width, own_row_M + 1)")],
    ),
    "a verify row sees a proposal": (
        fused_tail,
        [
            ("num_clean + width, own_row_M)", "num_clean + width, num_clean + width)"),
            ("tl.max(own_row_M, 0) + 1)", "num_clean + width)"),
        ],
    ),
    "a block sees itself backwards alone": (
        fused_tail,
        [("num_clean + width, own_row_M)", "own_row_M, own_row_M)")],
    ),
    "chunks are merged as they are": (
        fused_tail,
        [("out_MD * kept_M[:, None] + part_MD", "out_MD + part_MD")],
        CHUNKS,
    ),
    "the last chunk is left out": (fused_tail, [("(length, 0) + chunk_rows - 1)", "(length, 0))")]),
    "tiles are added as they are": (fused_softmax, [("out * kept[:, None]", "out")]),
    "the last row of a chunk counts twice": (fused_prefix, [("key_N < stop, 0.0", "key_N <= stop, 0.0")]),
    "a row behind a prefix is read": (
        fused_prefix,
        [("first_key), stop - 1)", "first_key), stop)"), ("N < stop", "N <= stop")],
    ),
    "heads of a key head are those of another": (
        fused_prefix,
        [("head * repeats + place_M % repeats", "place_M % repeats * num_key_heads + head")],
        HEADS,
    ),
    "a window is a key wider over a prefix": (fused_prefix, [("- window + 1", "- window")], WINDOW),
    "a window is a key wider over new rows": (
        fused_tail,
        [("num_behind, 0) - window + 1", "num_behind, 0) - window")],
        WINDOW,
    ),
    "rows before a text are seen": (
        fused_tail,
        [("tl.maximum(-length, 0)", "tl.maximum(0 * length, 0)")],
        NEGATIVE,
    ),
}


def planted(module, edits, folder, monkeypatch):
    """Kernels are made of their source, so the fault is written to a file and loaded."""
    source = Path(module.__file__).read_text()
    for old, new in edits:
        assert source.count(old) == 1, f"{old!r} is not there once"
        source = source.replace(old, new)
    path = folder / "planted.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("planted", path)
    wrong = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wrong)
    for user in USERS:
        for name in ("prefix_stage", "tail_stage", "added"):
            if hasattr(user, name) and hasattr(wrong, name):
                monkeypatch.setattr(user, name, getattr(wrong, name))


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
    module, edits, *case = FAULTS[name]
    planted(module, edits, tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match="assert"):
        compared(*case)
