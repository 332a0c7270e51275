"""Compiled rows against the torch code that defines them: drawn, read, cut, mixed, edited and redrawn.

Shapes: B requests, L rows, K drafts, N rows, U edited tokens, V vocabulary.
"""

import os
import stat
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from blockroll.kernels.block_verify.reference import _judged
from blockroll.kernels.rows import At, Cut, Edits, Mix, PackedLogits, PackedRows, compiled, logit_rows
from blockroll.kernels.rows.compiled import rows_library
from blockroll.kernels.rows.logit_rows import LogitRows, looked_at
from blockroll.types import Draft

pytestmark = pytest.mark.skipif(rows_library() is None, reason="there is no C compiler")

VOCAB = 16_403  # large, and no whole number of vectors or blocks
B, L = 5, 3
LEAST = 1e-30  # of numbers still smaller, compiled code makes 0
CUTS = [
    (50.0, 1.0, 0.0),
    (3000.0, 1.0, 0.0),
    (0.0, 0.9, 0.0),
    (0.0, 0.05, 0.0),
    (0.0, 1.0, 0.05),
    (40.0, 0.9, 0.1),
    (2500.0, 0.7, 0.0),
    (1.0, 1.0, 0.0),
    (float(VOCAB), 1.0, 0.0),
]
TEMPERATURES = torch.tensor([1.0, 0.7, 0.0, 1.9, 1.0], dtype=torch.float64)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coins(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def edits_of(size: int, *, seed: int = 4) -> Edits:
    """Of seven tokens of each row, of which the last two are one and the same, and one is left out."""
    ids_BU = torch.stack(
        [torch.randperm(VOCAB, generator=torch.Generator().manual_seed(b)) for b in range(size)]
    )
    ids_BU = ids_BU[:, :7]
    ids_BU[:, 6] = ids_BU[:, 5]
    logits_BLU = 4 * random(size, L, 7, seed=seed).double()
    logits_BLU[..., 6], logits_BLU[..., 0] = logits_BLU[..., 5], -torch.inf
    return Edits(ids_BU, logits_BLU)


def law(spread: float, options: tuple[float, float, float] | None, *, mixed=False, edited=False) -> LogitRows:
    """Random rows; the last request's are cut no more than they are mixed."""
    cut = None
    if options is not None:
        each_B = [options] * (B - 1) + [(0.0, 1.0, 0.0)]
        cut = Cut(*torch.tensor(each_B, dtype=torch.float64).unbind(dim=1))
    weight_B = torch.tensor([0.5, 0.2, 1.0, 0.9, 1.0], dtype=torch.float64)
    mix = Mix(spread * random(B, L - 1, VOCAB, seed=2), weight_B, torch.tensor([2, 1, 2, 0, 2]))
    return LogitRows(
        spread * random(B, L, VOCAB, seed=1) + 20,
        TEMPERATURES,
        True,
        cut,
        mix if mixed else None,
        edits_of(B) if edited else None,
    )


@pytest.fixture
def by_torch(monkeypatch):
    """Compute without compiled code."""

    def computed(function, *given):
        with monkeypatch.context() as patch:
            patch.setattr(logit_rows, "rows_library", lambda: None)
            return function(*given)

    return computed


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("options", [None, *CUTS], ids=str)
@pytest.mark.parametrize("spread", [0.3, 2.0, 9.0])
def test_laws_are_those_of_torch(by_torch, spread, options, edited, mixed):
    mine = law(spread, options, mixed=mixed, edited=edited)
    assert mine.table() is not None
    found, expected = mine.dense(), by_torch(mine.dense)
    # Float32 and float64 rows may fall to either side of an edge: of flat rows with many tokens near it.
    num_other = ((found > LEAST) != (expected > LEAST)).sum(dim=-1)
    assert num_other.max() <= 2
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(B, L).double(), rtol=0, atol=1e-12)
    assert ((found - expected).abs().sum(dim=-1) / 2 < 1e-6).all()


@pytest.mark.parametrize("options", CUTS, ids=str)
@pytest.mark.parametrize("spread", [0.3, 2.0, 9.0])
def test_rounded_logits_of_which_many_are_equal_are_cut_as_torch_cuts_them(by_torch, spread, options):
    mine = law(spread, options)
    mine = replace(mine, logits_BLV=mine.logits_BLV.bfloat16().float())
    found, expected = mine.dense(), by_torch(mine.dense)
    num_other_BL = ((found > LEAST) != (expected > LEAST)).sum(dim=-1)
    assert num_other_BL.max() <= 1
    assert (num_other_BL == 0).double().mean() > 0.8
    distance_BL = (found - expected).abs().sum(dim=-1) / 2
    assert (distance_BL[num_other_BL == 0] < 1e-6).all()


@pytest.mark.parametrize("size", [32_000, 151_936])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_weights_of_real_vocabularies_are_the_softmax_within_their_rounding(size, temperature):
    logits_11V = 4 * random(1, 1, size, seed=8) + 15
    temperature_1 = torch.tensor([temperature], dtype=torch.float64)
    exact_11V = (logits_11V.double() / temperature).softmax(dim=-1)
    found_11V = LogitRows(logits_11V, temperature_1, False).dense()
    assert (found_11V - exact_11V).abs().sum() / 2 < 1e-6
    torch.testing.assert_close(found_11V, exact_11V, rtol=1e-5, atol=1e-30)


def test_equal_weights_at_an_edge_stay_by_their_ids():
    logits = torch.zeros(1, 1, VOCAB)
    logits[0, 0, 700:] = -1.0
    one = torch.ones(1, dtype=torch.float64)
    for options, num_kept in [((300.0, 1.0, 0.0), 300), ((900.0, 1.0, 0.0), 900), ((0.0, 1.0, 0.9), 700)]:
        cut = Cut(*torch.tensor([options], dtype=torch.float64).unbind(dim=1))
        kept = LogitRows(logits, one, False, cut).dense()[0, 0].nonzero()[:, 0]
        assert kept.tolist() == [*range(num_kept)]
    cut = Cut(*torch.tensor([(0.0, 0.5, 0.0)], dtype=torch.float64).unbind(dim=1))
    flat = LogitRows(torch.zeros(1, 1, VOCAB), one, False, cut).dense()[0, 0]
    assert flat.nonzero()[:, 0].tolist() == [*range(-(-VOCAB // 2))]


@pytest.mark.parametrize("options", [None, CUTS[0], CUTS[2]], ids=str)
def test_a_uniform_draws_the_token_whose_interval_holds_it(options):
    mine = law(3.0, options)
    probs_BLV = mine.dense()
    cumulative_BLV = probs_BLV.cumsum(dim=-1)
    for share in (0.01, 0.5, 0.99):
        ids_BL = probs_BLV.flatten(0, 1).multinomial(1).view(B, L)
        own_BL = probs_BLV.gather(-1, ids_BL[..., None])[..., 0]
        high_BL = cumulative_BLV.gather(-1, ids_BL[..., None])[..., 0]
        at = At(*(each.flatten() for each in torch.meshgrid(torch.arange(B), torch.arange(L), indexing="ij")))
        looked = looked_at(mine, at, (high_BL - share * own_BL).flatten(), ids_BL.view(-1, 1))
        assert torch.equal(looked.token_ids_N, ids_BL.flatten())
        assert torch.equal(looked.probs_N, own_BL.flatten())
        assert torch.equal(looked.asked_NA[:, 0], own_BL.flatten())
        for found, expected in [(looked.high_N, high_BL), (looked.low_N, high_BL - own_BL)]:
            torch.testing.assert_close(found, expected.flatten(), rtol=0, atol=1e-12)
        assert (looked.mass_N == 1).all()


@pytest.mark.parametrize("uniform", [2.0**-53, 1 - 2.0**-53])
def test_the_least_and_the_largest_uniform_draw_tokens_that_have_a_weight(uniform):
    logits_11V = torch.full((1, 1, VOCAB), -torch.inf)
    logits_11V[..., [130, VOCAB - 5]] = 0.0
    one = torch.ones(1, dtype=torch.float64)
    token, _ = LogitRows(logits_11V, one, False).drawn(torch.full((1, 1), uniform, dtype=torch.float64))
    assert token.item() == (130 if uniform < 0.5 else VOCAB - 5)


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("options", [None, CUTS[0]], ids=str)
def test_packed_rows_have_the_laws_of_the_rectangle(options, edited):
    whole = law(3.0, options, edited=edited)
    num_rows_B = torch.tensor([3, 1, 2, 3, 1])
    has_row_BL = torch.arange(L) < num_rows_B[:, None]
    starts_B = num_rows_B.cumsum(0) - num_rows_B
    packed = PackedLogits(
        logits_NV=whole.logits_BLV[has_row_BL], starts_B=starts_B, num_rows_B=num_rows_B, width=L
    )
    mine = PackedRows(packed, TEMPERATURES, True, whole.cut, whole.edits)
    at = At(*has_row_BL.nonzero().unbind(dim=1))
    asked_N1 = torch.randint(VOCAB, (len(at.offsets_N), 1), generator=torch.Generator().manual_seed(3))
    for rest, there, place in [
        (mine, whole, at),
        (mine.behind_first(), whole.behind_first(), At(torch.tensor([0, 2, 3]), torch.tensor([1, 0, 0]))),
    ]:
        uniforms_N, asked = coins(len(place.offsets_N)), asked_N1[: len(place.offsets_N)]
        for found, expected in zip(
            looked_at(rest, place, uniforms_N, asked), looked_at(there, place, uniforms_N, asked), strict=True
        ):
            assert torch.equal(found, expected)
    logprobs_N = replace(mine, edits=None, cut=None, temperature_B=TEMPERATURES + 1).logprobs_at(
        at, asked_N1[:, 0]
    )
    exact_NV = (whole.logits_BLV.double() / (TEMPERATURES + 1)[:, None, None]).log_softmax(dim=-1)[at]
    torch.testing.assert_close(logprobs_N, exact_NV.gather(1, asked_N1)[:, 0], rtol=0, atol=1e-6)


def judged(draft: Draft, target: LogitRows, coin: float, uniforms_B: torch.Tensor, num_rows: int = L):
    """By the drafts' own probabilities, and one coin for all; NaN: every draft is rejected."""
    draft_p_BK = draft.law.probs_of(draft.token_ids_BK)
    return _judged(
        draft, draft.law, target, draft_p_BK, torch.full_like(draft_p_BK, coin), uniforms_B, num_rows=num_rows
    )


def near(target: LogitRows, spread: float) -> Draft:
    """Drafts by rows like these, one fewer of the third request."""
    noise_BKV = spread * random(B, L - 1, VOCAB, seed=6)
    law = LogitRows(target.logits_BLV[:, :-1] + noise_BKV, TEMPERATURES, True, target.cut)
    token_ids_BK, law = law.drawn(coins(B, L - 1))
    return Draft(token_ids_BK=token_ids_BK, law=law, num_drafts_B=torch.tensor([2, 2, 1, 2, 2]))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("options", [None, CUTS[0], CUTS[2]], ids=str)
@pytest.mark.parametrize("coin", [1e-9, 0.3, 0.9, torch.nan])
def test_drafts_are_judged_as_torch_judges_them(by_torch, options, mixed, coin):
    target = law(3.0, options, mixed=mixed)
    draft = near(target, 0.5)
    given = (draft, target, coin, coins(B))
    mine, other = judged(*given), by_torch(judged, *given)
    assert torch.equal(mine.num_accepted_B, other.num_accepted_B)
    if not coin >= 0:
        assert (mine.num_accepted_B == 0).all()
    is_seen_BK = torch.arange(L - 1) <= mine.num_accepted_B[:, None]
    is_seen_BK &= torch.arange(L - 1) < draft.num_drafts_B[:, None]
    assert torch.equal(mine.target_p_BK.isnan(), ~is_seen_BK)
    torch.testing.assert_close(
        mine.target_p_BK[is_seen_BK], other.target_p_BK[is_seen_BK], rtol=1e-5, atol=1e-9
    )
    is_same_B = mine.final.token_ids_N == other.final.token_ids_N
    assert is_same_B.sum() >= B - 1  # a uniform may lie where the two round to either side
    for name in ("probs_N", "low_N", "high_N", "mass_N"):
        pair = (getattr(each.final, name)[is_same_B] for each in (mine, other))
        torch.testing.assert_close(*pair, rtol=0, atol=2e-6)


@pytest.mark.parametrize("options", [None, CUTS[0], CUTS[2]], ids=str)
def test_what_replaces_a_draft_is_drawn_from_the_residual(options):
    target = law(3.0, options)
    draft, uniforms_B = near(target, 1.0), coins(B)
    found = judged(draft, target, torch.nan, uniforms_B).final
    at = At(torch.arange(B), torch.zeros(B, dtype=torch.int64))
    residual_BV = (target.at(*at) - draft.law.at(*at)).clamp(min=0)
    is_left_B = residual_BV.sum(dim=-1) > 0  # greedy rows of one token leave nothing
    own_B = residual_BV.gather(1, found.token_ids_N[:, None])[:, 0]
    torch.testing.assert_close(
        found.mass_N[is_left_B], residual_BV.sum(dim=-1)[is_left_B], rtol=0, atol=1e-12
    )
    torch.testing.assert_close((found.high_N - found.low_N)[is_left_B], own_B[is_left_B], rtol=0, atol=1e-12)
    assert (own_B[is_left_B] > 0).all()
    goal_B = uniforms_B * found.mass_N
    assert ((found.low_N <= goal_B + 1e-12) & (goal_B < found.high_N + 1e-12)).all()


def test_equal_rows_leave_no_residual_and_the_target_is_drawn_from():
    target = law(3.0, None)
    tokens_BK = torch.zeros(B, L - 1, dtype=torch.int64)
    draft = Draft(token_ids_BK=tokens_BK, law=target, num_drafts_B=torch.full((B,), L - 1))
    at, uniforms_B = At(torch.arange(B), torch.zeros(B, dtype=torch.int64)), coins(B)
    found, expected = judged(draft, target, torch.nan, uniforms_B).final, looked_at(target, at, uniforms_B)
    assert torch.equal(found.token_ids_N, expected.token_ids_N)
    assert torch.equal(found.mass_N, expected.mass_N)


def test_of_a_first_row_whose_draft_stands_nothing_is_drawn():
    target = law(3.0, None)
    found = judged(near(target, 0.1), target, 0.0, coins(B), num_rows=1)
    assert (found.num_accepted_B == 1).all()
    assert found.final.probs_N.isnan().all()


def test_more_threads_give_the_same(monkeypatch):
    mine = law(3.0, CUTS[0])
    alone = mine.drawn(coins(B, L))[1].known
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    together = mine.drawn(coins(B, L))[1].known
    assert all(map(torch.equal, alone, together))


def test_without_a_compiler_torch_serves_and_it_is_said(monkeypatch, caplog, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", os.fspath(broken))
    monkeypatch.setattr(logit_rows, "rows_library", compiled.rows_library.__wrapped__)
    assert law(3.0, None).table() is None
    assert "out of order" in caplog.text


ENDLESS = 1 << 58  # tokens of a row that no machine has memory for
BYTES = ENDLESS * 16 + ENDLESS // 128 * 12


def test_a_row_without_memory_is_an_error_with_its_bytes_and_the_next_one_is_served():
    mine = law(3.0, CUTS[0])
    expected, ids_BK = mine.dense(), torch.zeros((B, 2), dtype=torch.int64)
    drafts_p_BK, coins_BK = torch.ones((B, 2)), torch.ones((B, 2))  # no draft is accepted
    given = (ids_BK, drafts_p_BK, torch.full((B,), 2), coins_BK, coins(B))
    for spoils_draft in (False, True):
        table, draft = mine.table(), mine.table()
        spoiled = draft if spoils_draft else table
        size, spoiled._rows.vocab = spoiled._rows.vocab, ENDLESS
        calls = [lambda table=table, draft=draft: table.judged(draft, *given, num_rows=2)]
        if not spoils_draft:
            calls += [
                lambda table=table: table.dense(L, B),
                lambda table=table: table.looked(L, B, coins(B, L)),
            ]
        for call in calls:
            with pytest.raises(MemoryError, match=f"{BYTES} bytes for a row of {VOCAB} logits"):
                call()
        spoiled._rows.vocab = size
        assert all(drawn.isfinite().all() for drawn in table.judged(draft, *given, num_rows=2).final)
        assert torch.equal(mine.dense(), expected)


@pytest.mark.parametrize("temperature", [1e-37, 1e-39, 1e-60, 5e-324])
def test_the_coldest_temperatures_draw_the_best_token(by_torch, temperature):
    cold = replace(law(3.0, None), temperature_B=torch.full((B,), temperature, dtype=torch.float64))
    best_BL = cold.logits_BLV.argmax(dim=-1)
    small = replace(cold, logits_BLV=cold.logits_BLV[..., :100])
    for ids_BL, drawn in (cold.drawn(coins(B, L)), by_torch(cold.drawn, coins(B, L))):
        assert torch.equal(ids_BL, best_BL)
        assert (drawn.known.probs_BL == 1).all()
    at = At(*torch.ones((B, L)).nonzero().unbind(dim=1))
    assert (cold.logprobs_at(at, best_BL.flatten()) == 0).all()
    assert (by_torch(cold.logprobs_at, at, best_BL.flatten()) == 0).all()
    assert (small.dense().amax(dim=-1) == 1).all()


def test_numbers_of_another_type_are_read_as_what_they_are():
    mine = law(3.0, None)
    ids_BL, uniforms_BL = mine.logits_BLV.argsort(dim=-1)[..., -3], coins(B, L).float()
    assert torch.equal(mine.drawn(uniforms_BL)[0], mine.drawn(uniforms_BL.double())[0])
    assert torch.equal(mine.probs_of(ids_BL.int()), mine.probs_of(ids_BL))
    draft = near(mine, 0.1)
    given = (draft.token_ids_BK, draft.law.probs_of(draft.token_ids_BK), draft.num_drafts_B)
    tables, coins_BK = (mine.table(), draft.law.table()), uniforms_BL[:, 1:]
    found = tables[0].judged(
        tables[1], given[0].int(), given[1], given[2].int(), coins_BK, uniforms_BL[:, 0], num_rows=L
    )
    expected = tables[0].judged(tables[1], *given, coins_BK.double(), uniforms_BL[:, 0].double(), num_rows=L)
    assert torch.equal(found.num_accepted_B, expected.num_accepted_B)
    assert torch.equal(found.final.token_ids_N, expected.final.token_ids_N)


THREADS = """
import threading, torch
from blockroll.kernels.rows import LogitRows
logits, uniforms = torch.zeros(1, 1, 1 << 19), torch.full((1, 1), 0.5, dtype=torch.float64)
rows = LogitRows(logits, torch.ones(1, dtype=torch.float64), False)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
for number in range(60):
    thread = threading.Thread(target=rows.drawn, args=(uniforms,))
    thread.start()
    thread.join()
    if number == 9:
        before = resident()
print(resident() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is counted as Linux says it")
def test_threads_that_end_leave_no_memory_behind():
    """What a thread keeps from call to call would be 2 MB for each of these 50."""
    grown = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    assert int(grown.stdout) < 20 << 20
