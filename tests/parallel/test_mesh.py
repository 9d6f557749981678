"""The layout of processes, as numbers."""

from __future__ import annotations

import pytest

from switchkit.parallel import layout
from switchkit.parallel.mesh import check_experts, sharded_dimension


def test_sizes_multiply_to_the_processes() -> None:
    for world in (1, 2, 4, 12):
        for replicate in (n for n in range(1, world + 1) if world % n == 0):
            for expert in (n for n in range(1, world // replicate + 1) if world // replicate % n == 0):
                found = layout(world, expert, replicate)
                assert found.replicate * found.expert_shard * found.expert == found.world == world


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: layout(4, 3), "expert_parallel_size=3 does not divide 4 processes: use 1, 2 or 4"),
        (lambda: layout(6, 1, 4), "data_parallel_replicate=4 does not divide 6 processes: use 1, 2, 3 or 6"),
        (lambda: layout(8, 8, 2), "=8 does not divide the 4 of each of 2 copies processes: use 1, 2 or 4"),
        (lambda: layout(2, 0), "expert_parallel_size=0 does not divide 2 processes: use 1 or 2"),
        (lambda: layout(1, 2), "expert_parallel_size=2 does not divide 1 processes: use 1"),
        (lambda: check_experts("blocks.1.mlp", 6, 4), "the 6 experts of blocks.1.mlp .* use 1, 2, 3 or 6"),
    ],
)
def test_sizes_that_do_not_fit_name_those_that_do(call: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("shape", "shards", "dimension"),
    [((8, 6, 4), 2, 0), ((9, 6), 4, 0), ((1, 6, 4), 2, 1), ((2, 6, 4), 4, 2), ((3, 5), 4, 0), ((4,), 8, 0), ((), 2, 0)],
)
def test_a_first_dimension_that_is_too_short_gives_way(shape, shards, dimension):
    assert sharded_dimension(shape, shards) == dimension
