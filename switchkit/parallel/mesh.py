"""How many processes do what: the layout as numbers, and the meshes of process groups that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

__all__ = ["Layout", "Meshes", "check_experts", "layout", "sharded_dimension"]


@dataclass(frozen=True)
class Layout:
    """`replicate` copies of the model, each sharded over `shard` processes; `expert` of these share out the experts."""

    replicate: int
    shard: int
    expert: int

    @property
    def world(self) -> int:
        """All processes."""
        return self.replicate * self.shard

    @property
    def expert_shard(self) -> int:
        """Processes of a copy that hold parts of the same experts."""
        return self.shard // self.expert

    def meshes(self, device_type: str) -> Meshes:
        """The meshes over the processes of the default group, which must be there already; called on all of them."""
        dense = init_device_mesh(device_type, (self.replicate, self.shard), mesh_dim_names=("replicate", "shard"))
        sizes = (self.replicate, self.expert_shard, self.expert)
        sparse = init_device_mesh(device_type, sizes, mesh_dim_names=("replicate", "expert_shard", "expert"))
        return Meshes(dense, sparse)


@dataclass(frozen=True)
class Meshes:
    """Two views of the same processes, one for the experts and one for everything else, as torchtitan has them.

    `whole_dense` is ("replicate", "shard"), `whole_sparse` ("replicate", "expert_shard", "expert"): neighbouring
    processes share out the experts, so that tokens travel the shortest way.
    """

    whole_dense: DeviceMesh
    whole_sparse: DeviceMesh

    @property
    def dense(self) -> DeviceMesh:
        """What parameters that every process needs are sharded over (and copied, with two dimensions)."""
        return self.whole_dense if self.whole_dense["replicate"].size() > 1 else self.whole_dense["shard"]

    @property
    def expert(self) -> DeviceMesh:
        """What experts are shared out over."""
        return self.whole_sparse["expert"]

    @property
    def expert_data(self) -> DeviceMesh:
        """What the parameters of one process's experts are sharded over (and copied)."""
        if self.whole_sparse["replicate"].size() > 1:
            return self.whole_sparse["replicate", "expert_shard"]
        return self.whole_sparse["expert_shard"]


def layout(world: int, expert_parallel_size: int = 1, data_parallel_replicate: int = 1) -> Layout:
    """The layout of `world` processes.

    Raises:
        ValueError: a size that does not divide the processes; names those that do.
    """
    if data_parallel_replicate not in (fit := _divisors(world)):
        raise ValueError(
            f"data_parallel_replicate={data_parallel_replicate} does not divide {world} processes: use {_words(fit)}"
        )
    shard = world // data_parallel_replicate
    if expert_parallel_size not in (fit := _divisors(shard)):
        each = f"the {shard} of each of {data_parallel_replicate} copies" if data_parallel_replicate > 1 else f"{world}"
        raise ValueError(
            f"expert_parallel_size={expert_parallel_size} does not divide {each} processes: use {_words(fit)}"
        )
    return Layout(data_parallel_replicate, shard, expert_parallel_size)


def check_experts(name: str, num_experts: int, expert_parallel_size: int) -> None:
    """Refuses experts that cannot be shared out evenly.

    Raises:
        ValueError: names the sizes that would do.
    """
    if num_experts % expert_parallel_size:
        raise ValueError(
            f"the {num_experts} experts of {name} cannot be shared out over expert_parallel_size="
            f"{expert_parallel_size} processes: use {_words(_divisors(num_experts))}"
        )


def sharded_dimension(shape: Sequence[int], shards: int) -> int:
    """The dimension along which FSDP2 cuts a parameter: the first, as is its default, or if that has fewer entries than
    there are shards, the first one that they divide.

    A chunk without entries is stored and sent as large as the others: the one shared expert of a layer, [1, D, F],
    would be whole on every device. Other dimensions must divide evenly, which torch insists on.
    """
    if not shape or shape[0] >= shards:
        return 0
    return next((d for d, size in enumerate(shape) if size % shards == 0), 0)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _words(numbers: list[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
