"""What devices send each other in one optimizer step: collectives, their groups and bytes, and the time they take.

Bytes are those that leave one device. Of n devices, with W bytes in all: an all-gather and a reduce-scatter send
``(n - 1) / n * W``, an all-reduce twice that, which is the least possible (Patarasu and Yuan 2009, section 3); an
all-to-all of rows that are spread evenly sends ``(n - 1) / n`` of a device's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from switchkit.parallel.mesh import Layout
from switchkit.plan.hardware import Gpu, Precision
from switchkit.plan.units import Unit

__all__ = ["Collective", "Exchange", "Group", "ddp_collectives", "fsdp_collectives", "groups", "seconds"]

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]


@dataclass(frozen=True)
class Group:
    """Devices that talk to each other; `local` of them share a machine with the first, itself included."""

    size: int
    local: int


@dataclass(frozen=True)
class Collective:
    """All calls of one kind and purpose in a step."""

    kind: Kind
    what: str
    """Whose: "blocks", "experts", "root", "gradients", "tokens", "counts"."""
    group: Group
    whole: int
    """Bytes of the whole tensors, all calls together; of an all-to-all, of the device's own rows."""

    @property
    def sent(self) -> int:
        """Bytes that leave a device."""
        n = self.group.size
        return self.whole * (n - 1) * (2 if self.kind == "all_reduce" else 1) // n

    def seconds(self, gpu: Gpu) -> float:
        """At the links' full speed, without latency.

        A ring passes from machine to machine by the network cards of all its devices there together. Rows of an
        all-to-all leave the machine by the device's own card, while those to its neighbours take the faster links.
        """
        group = self.group
        if group.local == group.size:
            return self.sent / gpu.node_bandwidth
        if self.kind == "all_to_all":
            away = self.whole * (group.size - group.local) / group.size
            return max(away / gpu.network_bandwidth, (self.sent - away) / gpu.node_bandwidth)
        return self.sent / min(gpu.node_bandwidth, group.local * gpu.network_bandwidth)


@dataclass(frozen=True)
class Exchange:
    """One sparse layer's rows that a device sends to experts, and gets back, in a micro-batch."""

    rows: int
    width: int
    num_experts: int


def groups(layout: Layout, gpus: int) -> dict[str, Group]:
    """The groups of the first device, with `gpus` devices to a machine, by dimension of the meshes of `Layout`."""
    ranks = {
        "world": range(layout.world),
        "replicate": range(0, layout.world, layout.shard),
        "shard": range(layout.shard),
        "expert": range(layout.expert),
        "expert_shard": range(0, layout.shard, layout.expert),
    }
    return {name: Group(len(own), Counter(rank // gpus for rank in own)[0]) for name, own in ranks.items()}


def fsdp_collectives(
    units: Sequence[Unit],
    exchanges: Sequence[Exchange],
    layout: Layout,
    gpus: int,
    precision: Precision,
    *,
    accumulate: int = 1,
    checkpointing: bool = False,
) -> list[Collective]:
    """Of a step with `ExpertParallelStrategy`.

    In each micro-batch, blocks and experts are gathered for the forward pass and again for the backward pass, the root
    once (FSDP2 keeps it); blocks that are computed again are so within the second time. The gradients of a step are
    scattered once, and summed over the copies. Rows travel to experts and back in the forward
    pass, and so do their gradients; with recomputation the first two once more.
    """
    found = groups(layout, gpus)
    parts: list[Collective] = []
    width = precision.weight
    for kind, name in (("block", "blocks"), ("experts", "experts"), ("root", "root")):
        own = [unit for unit in units if unit.kind == kind]
        if not own:
            continue
        whole = width * sum(unit.gathered(layout) for unit in own)
        held = width * sum(unit.held(layout) for unit in own)
        group = found["expert_shard" if kind == "experts" else "shard"]
        times = accumulate * (1 if kind == "root" else 2)
        parts += [
            Collective("all_gather", name, group, whole * times),
            Collective("reduce_scatter", name, group, whole),
            Collective("all_reduce", name, found["replicate"], held),
        ]
    passes = accumulate * (2 if checkpointing else 1)
    # Rows go out as the residual stream is, and come back as products; gradients take the way back.
    there, back = precision.stream, precision.product
    rows = sum(each.rows * each.width for each in exchanges)
    parts.append(Collective("all_to_all", "tokens", found["expert"], rows * (there + back) * (passes + accumulate)))
    counts = 8 * sum(each.num_experts for each in exchanges) * passes
    parts.append(Collective("all_to_all", "counts", found["expert"], counts))
    parts.append(_step_counts(exchanges, found["world"], accumulate))
    return [part for part in parts if part.sent]


def ddp_collectives(
    units: Sequence[Unit],
    exchanges: Sequence[Exchange],
    world: int,
    gpus: int,
    precision: Precision,
    accumulate: int = 1,
) -> list[Collective]:
    """Of a step with DDP: gradients are summed once over all devices."""
    group = groups(Layout(1, world, 1), gpus)["world"]
    whole = precision.weight * sum(unit.numel for unit in units)
    parts = [Collective("all_reduce", "gradients", group, whole), _step_counts(exchanges, group, accumulate)]
    return [part for part in parts if part.sent]


def _step_counts(exchanges: Sequence[Exchange], group: Group, accumulate: int) -> Collective:
    """What `switchkit.step.Seen.everywhere` sums in each micro-batch, and one flag of the step."""
    layers, most = len(exchanges), max((each.num_experts for each in exchanges), default=0)
    return Collective("all_reduce", "counts", group, 8 * (1 + accumulate * (1 + layers * (most + 2))))


def seconds(parts: Sequence[Collective], gpu: Gpu, what: set[str]) -> float:
    """Time of the collectives of some purposes, one after the other."""
    return sum(part.seconds(gpu) for part in parts if part.what in what)
