"""The parameters of a model, in the units in which devices gather them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from switchkit.blocks import Block
from switchkit.layers import moe_layers
from switchkit.parallel.experts import stacked
from switchkit.parallel.mesh import Layout, check_experts, sharded_dimension
from switchkit.routing.base import Router

__all__ = ["Shape", "Unit", "padded", "part", "units"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together, as `switchkit.sharding.parallelize` makes the units of FSDP2."""

    kind: Literal["root", "block", "experts"]
    """What is in no block, a block without experts that are shared out, or the experts of a layer that are."""
    shapes: tuple[Shape, ...]
    block: int = -1
    """Which block it is, or belongs to; -1: none."""
    cast: int = 0
    """Numbers of it that autocast copies to half precision: those of matrices, routers left out."""

    @property
    def numel(self) -> int:
        """Numbers in all of it, on all devices."""
        return sum(map(math.prod, self.shapes))

    def parts(self, layout: Layout) -> tuple[Shape, ...]:
        """The shape of the first device's part of each parameter."""
        return tuple(part(shape, *self._over(layout)) for shape in self.shapes)

    def held(self, layout: Layout) -> int:
        """Numbers that a device stores of it: its parts, filled up to the size of the largest ones."""
        return sum(map(math.prod, self.parts(layout)))

    def gathered(self, layout: Layout) -> int:
        """Numbers that a device has of it while it computes: all of a dense unit, its own run of the experts."""
        return self.held(layout) * self.shards(layout)

    def shards(self, layout: Layout) -> int:
        """Devices over which it is gathered."""
        return self._over(layout)[1]

    def _over(self, layout: Layout) -> tuple[int, int]:
        return (layout.expert, layout.expert_shard) if self.kind == "experts" else (1, layout.shard)


def part(shape: Shape, expert: int, shard: int) -> Shape:
    """The shape of the first device's part: even runs of experts, then FSDP2's chunks along `sharded_dimension`.

    Chunks have ``ceil(size / shard)`` entries, of which the last ones may be empty; every chunk is stored and sent at
    that size.

    Source: `FSDPParam._init_sharded_param` of torch; torch.chunk.
    """
    if not shape:
        return shape
    own = (shape[0] // expert, *shape[1:])
    cut = sharded_dimension(own, shard)
    return (*own[:cut], -(-own[cut] // shard), *own[cut + 1 :])


def padded(unit: Unit, layout: Layout) -> float:
    """Numbers that all devices of a copy store for each number of the unit: 1, or more where chunks are filled up."""
    over = layout.shard if unit.kind != "experts" else layout.expert * layout.expert_shard
    return unit.held(layout) * over / max(unit.numel, 1)


def units(model: nn.Module, expert_parallel_size: int) -> tuple[Unit, ...]:
    """The units of a model, the root last.

    Raises:
        ValueError: experts that cannot be shared out over so many devices, or whose weights are not stacked.
    """
    taken: set[int] = set()
    blocks = [part for part in model.modules() if isinstance(part, Block)]
    routers = {id(p) for part in model.modules() if isinstance(part, Router) for p in part.parameters()}
    made = []
    if expert_parallel_size > 1:
        for name, layer in moe_layers(model).items():
            check_experts(name, layer.num_experts, expert_parallel_size)
            place = next((i for i, block in enumerate(blocks) if any(m is layer for m in block.modules())), -1)
            for owner in stacked(name, layer.experts):
                own = list(owner.parameters(recurse=False))
                made.append(_unit("experts", own, taken, routers, place))
    for index, block in enumerate(blocks):
        made.append(_unit("block", list(block.parameters()), taken, routers, index))
    embeddings = {id(p) for part in model.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
    if getattr(model, "head", None) is None and isinstance(embed := getattr(model, "embed", None), nn.Embedding):
        # The tied one is a matrix too.
        embeddings -= {id(embed.weight)}
    made.append(_unit("root", list(model.parameters()), taken, routers | embeddings, -1))
    return tuple(unit for unit in made if unit.shapes)


def _unit(
    kind: Literal["root", "block", "experts"],
    parameters: list[nn.Parameter],
    taken: set[int],
    whole: set[int],
    block: int,
) -> Unit:
    own = [p for p in parameters if id(p) not in taken]
    taken |= {id(p) for p in own}
    cast = sum(p.numel() for p in own if p.dim() > 1 and id(p) not in whole)
    return Unit(kind, tuple(tuple(p.shape) for p in own), block, cast)
