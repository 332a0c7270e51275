"""Uniforms: Philox bit for bit, strictly inside (0, 1), one word per use, keyed by the request alone.

Shapes: B requests, K drafted tokens.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from blockroll.kernels.philox import Coins, _rounds, beside, drawn, either
from blockroll.samplers import step_uniforms, token_uniforms
from blockroll.samplers.uniforms import Purpose, philox4x32, step_coins, u52

_MASK = 0xFFFFFFFF

# Known answers of Random123 (Salmon et al. 2011), philox4x32 with 10 rounds: counter, key, words.
KNOWN_ANSWERS = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((_MASK,) * 4, (_MASK, _MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "digits_of_pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}

SEEDS = [0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63), -(2**31), 0x123456789ABCDEF0]

TRITON_SCRIPT = """
import json, sys
import torch, triton
import triton.language as tl

@triton.jit
def words(SEED, COUNTER, OUT, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    keep = i < n
    seed = tl.load(SEED + i, mask=keep, other=0)
    c0 = tl.load(COUNTER + i, mask=keep, other=0)
    c1 = tl.load(COUNTER + n + i, mask=keep, other=0)
    c2 = tl.load(COUNTER + 2 * n + i, mask=keep, other=0)
    c3 = tl.load(COUNTER + 3 * n + i, mask=keep, other=0)
    r0, r1, r2, r3 = tl.philox(seed, c0, c1, c2, c3)
    tl.store(OUT + i, r0.to(tl.int32, bitcast=True), mask=keep)
    tl.store(OUT + n + i, r1.to(tl.int32, bitcast=True), mask=keep)
    tl.store(OUT + 2 * n + i, r2.to(tl.int32, bitcast=True), mask=keep)
    tl.store(OUT + 3 * n + i, r3.to(tl.int32, bitcast=True), mask=keep)

given = json.load(sys.stdin)
seed = torch.tensor(given["seeds"], dtype=torch.int64)
counter = torch.tensor(given["counters"], dtype=torch.int64).to(torch.int32)
out = torch.zeros_like(counter)
n = len(seed)
words[(1,)](seed, counter, out, n, BLOCK=triton.next_power_of_2(n))
print(json.dumps((out.to(torch.int64) & 0xFFFFFFFF).tolist()))
"""


def _signed(word: int) -> int:
    """The 64-bit two's complement of an unsigned 64-bit word."""
    return word - 2**64 if word >= 2**63 else word


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    seed = torch.tensor(_signed(key[0] | key[1] << 32))
    assert tuple(word.item() for word in philox4x32(seed, *counter)) == expected


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="compares with Triton, which is missing"
)
def test_philox_equals_triton_bit_for_bit(tmp_path):
    generator = torch.Generator().manual_seed(3)
    seeds = torch.cat([torch.tensor(SEEDS), torch.randint(-(2**63), 2**63 - 1, (91,), generator=generator)])
    counters_4N = torch.randint(0, 2**32, (4, len(seeds)), generator=generator)
    counters_4N[:, 0], counters_4N[:, 1] = 0, _MASK
    script = tmp_path / "triton_words.py"
    script.write_text(TRITON_SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps({"seeds": seeds.tolist(), "counters": counters_4N.tolist()}),
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert torch.stack(philox4x32(seeds, *counters_4N)).tolist() == json.loads(done.stdout)


def test_every_use_of_a_uniform_has_a_purpose_of_its_own():
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "DRAFT": 0,
        "ACCEPT": 1,
        "FINAL": 2,
        "TOKEN": 3,
    }


@pytest.mark.failure(43)
def test_u52_is_strictly_inside_zero_and_one_for_the_extreme_words():
    words = torch.tensor([0, _MASK])
    smallest, largest = u52(words, words).tolist()
    assert smallest == 2.0**-53
    assert largest == 1 - 2.0**-53
    assert 0 < smallest < largest < 1


def test_u52_keeps_every_one_of_its_52_bits():
    low = torch.tensor([0x0FFF, 0x1000, 0x1FFF, 0x2000])
    high = torch.full_like(low, 0x80000000)
    steps = (u52(high, low) - 0.5) * 2.0**53
    assert steps.tolist() == [1, 3, 3, 5]


@pytest.mark.parametrize("num_drafts", [0, 1, 5])
def test_a_step_has_one_draft_uniform_per_draft_and_one_verify_uniform_more(num_drafts):
    seeds_B = torch.arange(3)
    draft_BK, verify_BL = step_uniforms(seeds_B, 10 + seeds_B, 2 * seeds_B, num_drafts)
    assert draft_BK.shape == (3, num_drafts)
    assert verify_BL.shape == (3, num_drafts + 1)
    assert draft_BK.dtype == verify_BL.dtype == torch.float64


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_each_uniform_is_the_word_of_its_position_purpose_and_attempt(seed, num_drafts):
    draft_1K, verify_1L = step_uniforms(
        torch.tensor([seed]), torch.tensor([40]), torch.tensor([7]), num_drafts
    )
    words = [(40 + i, Purpose.DRAFT) for i in range(num_drafts)]
    words += [(40 + i, Purpose.ACCEPT) for i in range(num_drafts)]
    words += [(40 + num_drafts, Purpose.FINAL)]
    expected = [u52(*philox4x32(torch.tensor(seed), 0, c1, int(c2), 7)[:2]).item() for c1, c2 in words]
    assert draft_1K[0].tolist() + verify_1L[0].tolist() == expected


@pytest.mark.parametrize("attempt", [0, 7])
@pytest.mark.parametrize("settles", [False, True])
def test_a_position_has_one_coin_whatever_the_plan_and_the_attempt(attempt, settles):
    arguments = (torch.tensor([5, 6]), torch.tensor([40, 50]), torch.tensor([attempt, attempt]))
    alone = [token_uniforms(arguments[0], arguments[1] + i) for i in range(4)]
    for num_drafts in (0, 1, 3):
        _, verify = step_uniforms(*arguments, num_drafts, settles=settles, by_position=True)
        for i in range(num_drafts + 1):
            assert torch.equal(verify[:, i], alone[i])


def test_requests_that_go_by_position_change_no_coin_of_others():
    arguments = (torch.tensor([5, 6]), torch.tensor([40, 50]), torch.tensor([3, 4]), 2)
    (draws, by_attempt), (_, by_position) = (
        step_uniforms(*arguments, settles=True, by_position=each) for each in (False, True)
    )
    both = step_uniforms(*arguments, settles=True, by_position=torch.tensor([True, False]))
    assert torch.equal(both[0], draws)
    assert torch.equal(both[1], torch.stack([by_position[0], by_attempt[1]]))
    assert not (by_position == by_attempt).any()


@pytest.mark.failure(51)
def test_no_coin_comes_twice_in_a_long_run_with_rejections():
    """Positions are drafted, rejected and drafted again, under plans that change from step to step."""
    generator = torch.Generator().manual_seed(11)
    seeds_B = torch.tensor([5, -6])
    positions_B, attempts_B = torch.tensor([17, 17]), torch.tensor([0, 0])
    coins = []
    for _ in range(1500):
        num_drafts = int(torch.randint(0, 6, (), generator=generator))
        for uniforms in step_uniforms(seeds_B, positions_B, attempts_B, num_drafts):
            coins += uniforms.flatten().tolist()
        positions_B = positions_B + 1 + torch.randint(0, num_drafts + 1, (2,), generator=generator)
        attempts_B = attempts_B + 1
    assert len(coins) > 15_000
    assert len(set(coins)) == len(coins)
    assert all(0 < coin < 1 for coin in coins)


@pytest.mark.failure(54)
def test_coins_do_not_depend_on_the_batch_or_the_row():
    generator = torch.Generator().manual_seed(13)
    seeds_B = torch.randint(-(2**63), 2**63 - 1, (6,), generator=generator)
    positions_B = torch.randint(0, 10_000, (6,), generator=generator)
    attempts_B = torch.randint(0, 10_000, (6,), generator=generator)
    batched = step_uniforms(seeds_B, positions_B, attempts_B, 4)
    order_B = torch.tensor([4, 0, 5, 2, 1, 3])
    permuted = step_uniforms(seeds_B[order_B], positions_B[order_B], attempts_B[order_B], 4)
    for uniforms, reordered in zip(batched, permuted, strict=True):
        assert torch.equal(uniforms[order_B], reordered)
    for row in range(6):
        one = slice(row, row + 1)
        alone = step_uniforms(seeds_B[one], positions_B[one], attempts_B[one], 4)
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, batched, strict=True))


@pytest.mark.parametrize(
    ("seed", "position", "attempt"),
    [(10, 20, 31), (10, 500, 30), (11, 20, 30), (10 + 2**32, 20, 30), (-10, 20, 30)],
    ids=["attempt", "position", "seed", "high_half_of_the_seed", "sign_of_the_seed"],
)
def test_seed_position_and_attempt_each_change_every_coin(seed, position, attempt):
    first = step_uniforms(torch.tensor([10]), torch.tensor([20]), torch.tensor([30]), 3)
    second = step_uniforms(torch.tensor([seed]), torch.tensor([position]), torch.tensor([attempt]), 3)
    assert set(torch.cat(first, dim=1)[0].tolist()).isdisjoint(torch.cat(second, dim=1)[0].tolist())


def test_coins_look_uniform_and_uncorrelated_across_positions_and_purposes():
    """Mean, variance and correlations lie within five standard errors over 4096 seeds."""
    num_seeds = 4096
    seeds_B = torch.arange(num_seeds)
    columns = torch.cat(
        step_uniforms(seeds_B, torch.zeros_like(seeds_B), torch.zeros_like(seeds_B), 3), dim=1
    )
    tolerance = 5 / math.sqrt(num_seeds)
    assert (columns.mean(dim=0) - 0.5).abs().max() < tolerance * math.sqrt(1 / 12)
    assert (columns.var(dim=0) - 1 / 12).abs().max() < tolerance * math.sqrt(1 / 180)
    assert (torch.corrcoef(columns.T) - torch.eye(columns.shape[1])).abs().max() < tolerance


def test_torch_rounds_equal_those_in_numpy():
    """NumPy serves the CPU, torch every other device; here both run on the CPU."""
    generator = torch.Generator().manual_seed(0)
    x, y, key = (torch.randint(_MASK + 1, (2, 40, 9), generator=generator) for _ in range(3))
    in_torch = _rounds(x, y, key, constants=torch.tensor, swap=torch.flipud)
    in_numpy = _rounds(x.numpy(), y.numpy(), key.numpy(), constants=np.array, swap=np.flipud)
    for words, others in zip(in_torch, in_numpy, strict=True):
        assert (words.numpy() == others).all()


def both_ways(**options):
    seeds_B, positions_B = torch.tensor([3, -5, 2**63 - 1]), torch.tensor([10, 2**31, 7])
    given = (seeds_B, positions_B, torch.tensor([0, 4, 9]), 3)
    return step_uniforms(*given, **options), step_coins(*given, **options)


@pytest.mark.parametrize("by_position", [False, True, torch.tensor([True, False, True])], ids=str)
@pytest.mark.parametrize("settles", [False, True])
def test_coins_are_the_uniforms_that_they_stand_for(settles, by_position):
    for uniforms, coins in zip(*both_ways(settles=settles, by_position=by_position), strict=True):
        assert isinstance(coins, Coins)
        assert (coins.shape, coins.dtype, coins.dim()) == (uniforms.shape, uniforms.dtype, uniforms.dim())
        assert torch.equal(drawn(coins), uniforms)


def test_coins_are_taken_apart_and_joined_as_uniforms_are():
    (_, uniforms), (_, coins) = both_ways(settles=True)
    for index in ((slice(None), slice(1, 3)), (slice(1, 2), slice(None)), (slice(None), [0, -1])):
        assert torch.equal(drawn(coins[index]), uniforms[index])
    parts = [(each[:, :2], each[:, -2:]) for each in (uniforms, coins)]
    assert torch.equal(*(drawn(beside(*each)) for each in parts))
    is_first_B = torch.tensor([False, True, False])
    assert torch.equal(*(drawn(either(is_first_B, *each)) for each in parts))
