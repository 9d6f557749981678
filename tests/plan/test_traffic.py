"""Bytes and seconds of collectives in closed form."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from switchkit.parallel import Layout
from switchkit.parallel.mesh import sharded_dimension
from switchkit.plan import PRECISIONS, Collective, Exchange, Gpu, Group, Unit, fsdp_collectives, groups, part
from switchkit.plan.units import padded

GPU = Gpu("test", 1e9, 1e12, 1e11, node_bandwidth=400.0, network_bandwidth=50.0)


def ring(kind: str, n: int, whole: int) -> int:
    """What one process of a ring sends, step by step: n pieces, n - 1 steps a way."""
    piece = whole // n
    ways = 2 if kind == "all_reduce" else 1
    return sum(piece for _ in range(ways) for _ in range(n - 1))


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce"])
@pytest.mark.parametrize("n", [1, 2, 6])
def test_a_ring_sends_what_is_counted(kind, n):
    assert Collective(kind, "blocks", Group(n, n), 720).sent == ring(kind, n, 720)


def test_groups_are_those_of_the_meshes():
    """16 devices on machines of 4: two copies, each over two machines; four neighbours share out the experts."""
    found = groups(Layout(2, 8, 4), 4)
    assert found == {
        "world": Group(16, 4),
        "replicate": Group(2, 1),  # devices 0 and 8
        "shard": Group(8, 4),
        "expert": Group(4, 4),
        "expert_shard": Group(2, 1),  # devices 0 and 4
    }


def test_seconds():
    # Within a machine by its links.
    assert Collective("all_gather", "blocks", Group(4, 4), 1600).seconds(GPU) == 1200 / 400
    # Over machines by four cards at once, or by one where a machine has one device of the group.
    assert Collective("all_gather", "blocks", Group(8, 4), 1600).seconds(GPU) == 1400 / 200
    assert Collective("all_reduce", "blocks", Group(2, 1), 1600).seconds(GPU) == 1600 / 50
    # Never faster than the links within.
    assert Collective("all_gather", "blocks", Group(32, 16), 3200).seconds(GPU) == 3100 / 400
    # Half of the rows leave the machine by one card, a half less the own share stays: the card is what takes long.
    assert Collective("all_to_all", "tokens", Group(8, 4), 1600).seconds(GPU) == 800 / 50
    assert Collective("all_to_all", "tokens", Group(8, 8), 1600).seconds(GPU) == 1400 / 400
    # Slow neighbours are what it waits for: 600 of the 1400 that leave a device stay in the machine.
    slow = replace(GPU, node_bandwidth=20.0)
    assert Collective("all_to_all", "tokens", Group(8, 4), 1600).seconds(slow) == 600 / 20


@pytest.mark.parametrize(
    ("shape", "expert", "shard", "expected"),
    [
        ((8, 16, 24), 1, 2, (4, 16, 24)),
        ((8, 16, 24), 2, 2, (2, 16, 24)),
        ((11, 16), 1, 4, (3, 16)),
        # Along the second dimension where the first has too few entries, along the third where that does not divide.
        ((8, 16, 24), 1, 16, (8, 1, 24)),
        ((8, 16, 24), 4, 24, (2, 16, 1)),
        ((1, 16, 24), 1, 4, (1, 4, 24)),
        # Nothing divides: one expert each for eight devices, and one in store for every other.
        ((8, 16, 24), 1, 128, (1, 16, 24)),
        ((16,), 1, 3, (6,)),
    ],
)
def test_parts_are_torchs_chunks(shape, expert, shard, expected):
    assert part(shape, expert, shard) == expected
    own = torch.empty(shape, device="meta").chunk(expert)[0]
    assert tuple(own.chunk(shard, sharded_dimension(own.shape, shard))[0].shape) == expected


def test_what_chunks_waste():
    assert padded(Unit("block", ((8, 2), (12,))), Layout(1, 4, 1)) == 1
    assert padded(Unit("block", ((9, 2),)), Layout(1, 4, 1)) == 12 / 9
    assert padded(Unit("block", ((8, 16, 24),)), Layout(1, 128, 1)) == 16
    # Shared out over 8 devices, of which each expert has one of 16 parts.
    assert padded(Unit("experts", ((8, 16, 24),)), Layout(1, 128, 8)) == 1


def test_a_step_in_full():
    """A block of 40 numbers, experts of 4 x 6, a root of 10; two devices share out experts, two hold each of them."""
    units = (Unit("experts", ((4, 6),), 0), Unit("block", ((4, 10),), 0), Unit("root", ((8,),)))
    given = {"units": units, "exchanges": [Exchange(100, 6, 4)], "gpus": 8, "precision": PRECISIONS["bf16-mixed"]}

    def sizes(**more):
        found = fsdp_collectives(**given, **more)
        return {(one.kind, one.what): (one.whole, one.group.size, one.sent) for one in found}

    once = sizes(layout=Layout(2, 4, 2))
    assert once == {
        # Float32 weights. Twice a micro-batch, and the root once.
        ("all_gather", "blocks"): (2 * 4 * 40, 4, 2 * 4 * 30),
        ("all_gather", "experts"): (2 * 4 * 12, 2, 4 * 12),
        ("all_gather", "root"): (4 * 8, 4, 4 * 6),
        ("reduce_scatter", "blocks"): (4 * 40, 4, 4 * 30),
        ("reduce_scatter", "experts"): (4 * 12, 2, 4 * 6),
        ("reduce_scatter", "root"): (4 * 8, 4, 4 * 6),
        # A device's part, over two copies.
        ("all_reduce", "blocks"): (4 * 10, 2, 4 * 10),
        ("all_reduce", "experts"): (4 * 6, 2, 4 * 6),
        ("all_reduce", "root"): (4 * 2, 2, 4 * 2),
        # Out in float32, back in half precision, and so do the gradients.
        ("all_to_all", "tokens"): (100 * 6 * (4 + 2) * 2, 2, 100 * 6 * 6),
        ("all_to_all", "counts"): (8 * 4, 2, 8 * 2),
        ("all_reduce", "counts"): (8 * (2 + 4 + 2), 8, Fraction(8 * 8 * 14, 8)),
    }
    thrice = sizes(layout=Layout(2, 4, 2), accumulate=3)
    for key, (whole, _, _) in thrice.items():
        often = key[0] in ("all_gather", "all_to_all") or key[1] == "counts"
        # Whether all losses are finite is asked once.
        asked = 8 if key == ("all_reduce", "counts") else 0
        assert whole - asked == (once[key][0] - asked) * (3 if often else 1)
    again = sizes(layout=Layout(2, 4, 2), checkpointing=True)
    assert again[("all_to_all", "tokens")][0] == 100 * 6 * 6 * 3
    # One device talks to nobody.
    assert sizes(layout=Layout(1, 1, 1)) == {}
