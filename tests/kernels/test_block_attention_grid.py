"""Programs and chunks of `block_attention`: each is there once, and the host counts them by shapes alone."""

import pytest
import torch
import triton
import triton.language as tl

from blockroll.kernels.block_attention.fused_prefix import placed
from blockroll.kernels.block_attention.fused_softmax import CHUNKS, chunk_size, most_chunks


@triton.jit
def _placed_all(GROUP, TILE, num_tiles, num_dies):
    pid = tl.program_id(0)
    group, tile = placed(pid, tl.num_programs(0) // num_tiles, num_tiles, num_dies)
    tl.store(GROUP + pid, group)
    tl.store(TILE + pid, tile)


@triton.jit
def _sized(LENGTHS, SIZES, least, N: tl.constexpr):
    at_N = tl.arange(0, N)
    tl.store(SIZES + at_N, chunk_size(tl.load(LENGTHS + at_N), least))


@pytest.mark.parametrize(
    ("groups", "tiles", "dies"), [(5, 1, 1), (7, 3, 1), (16, 3, 8), (21, 2, 8), (3, 4, 8), (9, 1, 8)]
)
def test_every_tile_of_every_group_runs_once_and_those_of_a_group_on_one_die_in_turn(groups, tiles, dies):
    group, tile = torch.full((2, groups * tiles), -1, dtype=torch.int32)
    _placed_all[(groups * tiles,)](group, tile, tiles, dies)
    programs = {}
    for program, place in enumerate(zip(group.tolist(), tile.tolist(), strict=True)):
        programs[place] = program
    assert programs.keys() == {(one, other) for one in range(groups) for other in range(tiles)}
    for one in range(groups // dies * dies):
        assert [programs[one, other] - programs[one, 0] for other in range(tiles)] == [
            dies * other for other in range(tiles)
        ]


@pytest.mark.parametrize("least", [256, 512, 4096, 65536])
def test_no_prefix_has_more_chunks_than_the_host_expects_of_its_table(least):
    edges = [step << power for power in range(7, 19) for step in (1, 2, 3)]
    lengths = sorted({max(0, edge + off) for edge in edges for off in (-1, 0, 1)})[:64]
    lengths += [length * 16 for length in lengths]
    given = torch.tensor(lengths, dtype=torch.int32)
    sizes = torch.empty_like(given)
    _sized[(1,)](given, sizes, least, N=len(lengths))
    counts = [-(-length // size) for length, size in zip(lengths, sizes.tolist(), strict=True)]
    for extent, own in zip(lengths, counts, strict=True):
        within = [count for length, count in zip(lengths, counts, strict=True) if length <= extent]
        assert own <= max(within) <= most_chunks(extent, least)
    assert all(size >= least and size & (size - 1) == 0 for size in sizes.tolist())
    assert all(count <= CHUNKS for length, count in zip(lengths, counts, strict=True) if length <= 1 << 17)
