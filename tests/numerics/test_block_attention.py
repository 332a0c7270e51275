"""`block_attention`: each row attends to the keys that it sees, by its definition and as it runs on a CPU."""

import pytest
import torch

from blockroll.errors import InvalidInput
from blockroll.kernels.block_attention import (
    BlockRows,
    Packing,
    RowLayout,
    block_attention,
    masked_attention,
    window_attention,
)
from blockroll.kernels.pages import Pages
from blockroll.policies.attention import Attended
from blockroll.policies.layout import causal_rows, fused_rows, two_forward_rows
from blockroll.rollout.engine.cache.pages import PagedCache
from tests.models import prompts, random_policy
from tests.numerics.attention_by_hand import LAYOUTS, LENGTHS, PAGE, Numbers, by_hand, numbers, paged


def in_a_window(given, lengths, *, stale=100.0):
    """Keys and values (B, G, S, D) as a contiguous cache has them, new rows behind the prefix."""
    extent = max(lengths) + given.query.shape[2] + 3
    held = []
    for prefix, new in zip(given.prefix, given.new, strict=True):
        rows = torch.full((len(lengths), new.shape[1], extent, new.shape[3]), stale, dtype=new.dtype)
        for request, length in enumerate(lengths):
            rows[request, :, :length] = prefix[request]
            rows[request, :, length : length + new.shape[2]] = new[request]
        held.append(rows)
    return extent, *held


def defined(given, layout, lengths, *, size=PAGE, **options):
    pages = paged(given.prefix, size=size)
    return block_attention(given.query, *given.new, pages, layout, torch.tensor(lengths), **options)


OPTIONS = [{}, {"softcap": 1.5}, {"sliding_window": 4}, {"scaling": 0.3, "softcap": 2.0, "sliding_window": 2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_definition_is_what_is_counted_out_by_hand(name, options):
    layout = LAYOUTS[name]
    given = numbers(layout)
    want = by_hand(given, layout, LENGTHS, **options)
    torch.testing.assert_close(defined(given, layout, LENGTHS, **options), want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_window_on_a_cpu_gives_what_the_definition_gives(name, options, dtype):
    layout = LAYOUTS[name]
    given = numbers(layout, dtype=dtype)
    extent, keys, values = in_a_window(given, LENGTHS)
    rows = BlockRows.of(layout, torch.tensor(LENGTHS), extent)
    for _ in range(2):  # the second layer reads the mask that the first has made
        found = window_attention(given.query, keys, values, rows, **options)
        bound = 1e-5 if dtype == torch.float32 else 0.05
        want = defined(given, layout, LENGTHS, **options)
        assert found.dtype == want.dtype == dtype
        assert (found.double() - want.double()).abs().max() < bound
    assert len(rows._made) == (1 if "softcap" in options else 2)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_rows_attend_as_those_of_the_rectangle(options):
    layout, counts = causal_rows(24), (1, 24, 2, 1)
    given, packing = numbers(layout), Packing.of(counts, 24, torch.device("cpu"))
    whole = by_hand(given, layout, LENGTHS, **options)
    want = torch.cat([rows[:count] for rows, count in zip(whole, counts, strict=True)])[None]
    query, *new = (packing.pack(each.transpose(1, 2)).transpose(1, 2) for each in (given.query, *given.new))
    pages, lengths = paged(given.prefix), torch.tensor(LENGTHS)
    found = block_attention(query, *new, pages, layout, lengths, packing=packing, **options)
    torch.testing.assert_close(found, want, atol=1e-12, rtol=0)
    extent, keys, values = in_a_window(given, LENGTHS)
    rows = BlockRows.of(layout, lengths, extent, packing)
    for _ in range(2):
        found = window_attention(query, keys, values, rows, **options)
        torch.testing.assert_close(found, want, atol=1e-6, rtol=0)
    assert len(packing.bands) > 1


@pytest.mark.parametrize("size", [1, 2, 8, 64])
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (7, 1)], ids=str)
def test_any_page_size_and_any_number_of_heads_serve(heads, size):
    layout = LAYOUTS["fused"]
    given = numbers(layout, heads=heads, width=3, lengths=(0, 7, 64))
    want = by_hand(given, layout, (0, 7, 64))
    torch.testing.assert_close(defined(given, layout, (0, 7, 64), size=size), want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["two-forward", "fused", "fused with last levels first"])
def test_clean_rows_are_the_same_bit_for_bit_whatever_masks_hold(name):
    layout = LAYOUTS[name]
    given = numbers(layout, dtype=torch.float32)
    want = defined(given, layout, LENGTHS)[:, : layout.num_clean]
    for new in given.new:
        new[:, :, layout.num_clean :] = torch.nan
    assert torch.equal(defined(given, layout, LENGTHS)[:, : layout.num_clean], want)


def test_a_block_is_the_same_bit_for_bit_whatever_later_drafts_and_other_blocks_hold():
    layout = LAYOUTS["fused"]
    given = numbers(layout)
    want = defined(given, layout, LENGTHS)[:, 4:8]
    for new in given.new:
        new[:, :, 1:4] = torch.nan
        new[:, :, 8:] = torch.nan
    assert torch.equal(defined(given, layout, LENGTHS)[:, 4:8], want)


def test_a_request_alone_is_the_same_as_in_a_batch():
    layout = LAYOUTS["fused"]
    given = numbers(layout)
    together = defined(given, layout, LENGTHS)
    for request, length in enumerate(LENGTHS):
        alone = Numbers(
            given.query[request : request + 1],
            [each[request : request + 1] for each in given.new],
            [[each[request]] for each in given.prefix],
        )
        torch.testing.assert_close(
            defined(alone, layout, (length,)), together[request : request + 1], atol=1e-12, rtol=0
        )


@pytest.mark.parametrize(
    "name", ["a level more", "a row less of the prefix", "no window", "anchor sees masks"]
)
def test_layouts_that_are_read_wrongly_are_found_out(name):
    layout, options, lengths = LAYOUTS["fused"], {}, LENGTHS
    if name == "a level more":
        layout = fused_rows(3, (1, 3))
    if name == "a row less of the prefix":
        lengths = tuple(max(0, length - 1) for length in LENGTHS)
    if name == "no window":
        options = {"sliding_window": 3}
    if name == "anchor sees masks":
        layout = RowLayout(num_clean=0, width=12, levels=(-1,))
    given = numbers(LAYOUTS["fused"])
    want = by_hand(given, LAYOUTS["fused"], LENGTHS, **options)
    pages = paged(given.prefix, poison=0.0)
    found = block_attention(given.query, *given.new, pages, layout, torch.tensor(lengths))
    assert (found - want).abs().max() > 1e-3


def test_a_stale_row_that_is_read_is_found_out():
    layout = LAYOUTS["causal"]
    given = numbers(layout)
    pages = paged(given.prefix)
    lengths = torch.tensor(LENGTHS)
    lengths[2] += 1
    found = block_attention(given.query, *given.new, pages, layout, lengths)
    assert found[2].isnan().all()
    assert found[3:].isfinite().all()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2", "gemma3_text"])
def test_every_forward_of_a_policy_attends_as_the_definition_says_over_its_pages(family, monkeypatch):
    policy, texts, calls = random_policy(family), prompts(5), []
    real = Attended.outputs

    def noted(self, layer, query, *keys_and_values, **options):
        output = real(self, layer, query, *keys_and_values, **options)
        calls.append((self, layer, query, keys_and_values, options, output))
        return output

    monkeypatch.setattr(Attended, "outputs", noted)
    cache = PagedCache(policy, page_size=4, num_slots=len(texts))
    cache.reserve(num_slots=len(texts), capacity=48)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    size, longest = ids.shape
    forwards = (
        (longest, lambda window: policy.prefill(ids, window)),
        (4, lambda window: policy.verify_logits(ids[:, :4], window)),
        (5, lambda window: policy.draft_logits(ids[:, :2], 3, window)),
        (12, lambda window: policy.fused_rows(ids[:, :4], (0, 3), window)),
    )
    for num_rows, forward in forwards:
        window = cache.window(0, size, num_rows)
        calls.clear()
        forward(window)
        assert len(calls) == policy.model.config.num_hidden_layers
        for attended, layer, query, held, options, output in calls:
            lengths = window.lengths_B.tolist()
            new = [
                torch.stack([rows[b, :, n : n + num_rows] for b, n in enumerate(lengths)]) for rows in held
            ]
            keys, values = cache.memory.layer(layer)
            pages = Pages(keys_NGZD=keys, values_NGZD=values, table_BT=window.table_BT)
            options.pop("dropout")
            want = block_attention(
                query,
                *new,
                pages,
                attended.rows.layout,
                window.lengths_B,
                sliding_window=attended.sliding_windows[layer],
                **options,
            )
            torch.testing.assert_close(output, want, atol=1e-5, rtol=0)
        if num_rows == longest:
            cache.commit(0, [text[:-1] for text in texts])


def test_without_a_mask_the_last_rows_of_a_text_look_back():
    """As transformers asks where it makes none: a whole text, and one row."""
    for layout, lengths in ((causal_rows(6), (0, 0)), (causal_rows(1), (9, 9))):
        given = numbers(layout, lengths=lengths)
        keys, values = (
            torch.cat([torch.stack(prefix), new], dim=2)
            for prefix, new in zip(given.prefix, given.new, strict=True)
        )
        for softcap in (None, 1.5):
            found = masked_attention(given.query, keys, values, None, scaling=None, softcap=softcap)
            want = by_hand(given, layout, lengths, softcap=softcap)
            torch.testing.assert_close(found, want, atol=1e-6, rtol=0)


def test_rows_before_a_texts_first_token_see_something_and_change_nothing():
    layout = two_forward_rows(4, 2)
    mask = layout.mask(torch.tensor([-2, 0]), 8)
    assert mask.any(dim=-1).all()
    assert mask[0, 0, 2:, 0].all()  # the first token is the third row
    assert not mask[0, 0, 2, 1:].any()
    assert layout.positions(torch.tensor([-2, 0])).tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rows_before_a_texts_first_token_are_seen_by_none_over_pages(options):
    layout, lengths = causal_rows(6), (-2, 0, -5, 3, -7)
    given = numbers(layout, lengths=lengths)
    want = by_hand(given, layout, lengths, **options)
    for each in (given.query, *given.new):
        each[0, :, :2] = each[2, :, :5] = each[4] = torch.nan
    found = defined(given, layout, lengths, **options)
    torch.testing.assert_close(found, want, atol=1e-12, rtol=0)
    assert (found[0, :2] == 0).all()
    assert (found[4] == 0).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_clean": -1}, "give a number of rows from 0 on"),
        ({"num_clean": 3, "width": 2}, "a width with levels or neither"),
        ({"num_clean": 3, "levels": (0,)}, "a width with levels or neither"),
        ({"num_clean": 3, "width": 2, "levels": (0, 3)}, "-1 to 2"),
        ({"num_clean": 0, "width": 2, "levels": (-2,)}, "the last clean row that a block sees"),
    ],
)
def test_layouts_that_mean_nothing_are_refused(options, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        RowLayout(**options)


def changed(given, pages, change):
    arguments = {
        "query_BHRD": given.query,
        "key_BGRD": given.new[0],
        "value_BGRD": given.new[1],
        "pages": pages,
        "layout": LAYOUTS["causal"],
        "lengths_B": torch.tensor(LENGTHS),
    }
    return arguments | change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"query_BHRD": torch.zeros(4, 3, 6, 5)}, "with H a multiple of G"),
        ({"key_BGRD": torch.zeros(4, 2, 6, 4)}, r"keys \(4, 2, 6, 4\)"),
        ({"value_BGRD": torch.zeros(4, 2, 5, 5)}, r"values \(4, 2, 5, 5\)"),
        ({"layout": causal_rows(5)}, "the layout has 5 rows"),
        ({"lengths_B": torch.zeros(5, dtype=torch.int64)}, r"lengths of \(5,\)"),
        ({"sliding_window": 0}, "give 1 position or more, or None"),
        (
            {"packing": Packing.of((1, 2, 1, 1), 6, torch.device("cpu"))},
            "6 packed rows came, of a packing of 5",
        ),
    ],
)
def test_numbers_that_do_not_belong_together_are_refused(change, sentence):
    given = numbers(LAYOUTS["causal"], dtype=torch.float32)
    with pytest.raises(InvalidInput, match=sentence):
        block_attention(**changed(given, paged(given.prefix), change))


def test_pages_of_another_shape_are_refused():
    keys, table = torch.zeros(4, 2, 16, 5), torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(InvalidInput, match="a page has 12 rows: give a power of two"):
        Pages(keys_NGZD=keys[:, :, :12], values_NGZD=keys[:, :, :12], table_BT=table)
    with pytest.raises(InvalidInput, match="give both as"):
        Pages(keys_NGZD=keys, values_NGZD=keys.half(), table_BT=table)
    with pytest.raises(InvalidInput, match="give int64"):
        Pages(keys_NGZD=keys, values_NGZD=keys, table_BT=table.float())
    given = numbers(LAYOUTS["causal"])
    other = Pages(keys_NGZD=keys.double(), values_NGZD=keys.double(), table_BT=table)
    with pytest.raises(InvalidInput, match="pages are of 3 requests"):
        block_attention(**changed(given, other, {}))
