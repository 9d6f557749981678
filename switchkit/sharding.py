"""A model cut up over devices: FSDP2 for its blocks, and the experts of its sparse layers shared out."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint as recompute

from switchkit.blocks import Block
from switchkit.layers import moe_layers
from switchkit.parallel.exchange import Exchange
from switchkit.parallel.experts import shard_experts, stacked
from switchkit.parallel.mesh import Meshes, check_experts, sharded_dimension
from switchkit.parallel.place import part_of

__all__ = ["parallelize", "take_from_first", "take_part"]


def parallelize(
    module: nn.Module, meshes: Meshes, device: torch.device, *, checkpointing: bool = False, compiling: bool = False
) -> None:
    """Shard the children of a module over the meshes, in place; a second time it does nothing.

    All processes start from the values of the first. Units are the blocks, and within them the experts.

    Raises:
        ValueError: parameters of the module itself, experts that cannot be shared out.
    """
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        return
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if own:
        raise ValueError(f"{type(module).__name__} has parameters of its own ({own[0]}): put them into a child module")
    shares = meshes.expert.size()
    sparse = moe_layers(module) if shares > 1 else {}
    for name, layer in sparse.items():
        # Before anything is changed.
        check_experts(name, layer.num_experts, shares)
        stacked(name, layer.experts)
    for tensor in [*module.parameters(), *module.buffers()]:
        if not tensor.is_meta:
            take_from_first(tensor.data, device)
    cut = partial(_placement, meshes.whole_dense["shard"].size())
    cut_experts = partial(_placement, meshes.whole_sparse["expert_shard"].size())
    for name, layer in sparse.items():
        shard_experts(name, layer.experts, meshes.expert)
        layer.dispatcher = Exchange(layer.dispatcher, meshes.expert.get_group())
        for owner in stacked(name, layer.experts):
            fully_shard(owner, mesh=meshes.expert_data, shard_placement_fn=cut_experts)
        if compiling:
            layer.forward = partial(_as_it_is, layer)  # type: ignore[method-assign]
    for part in list(module.modules()):
        if isinstance(part, Block):
            # On the instance, so that FSDP's hooks gather the weights around it.
            if compiling:
                part.forward = torch.compile(part.forward)  # type: ignore[method-assign]
            if checkpointing:
                # Around what is compiled: in it, the wait of a sparse layer would keep all of it from being compiled.
                part.forward = partial(recompute, part.forward, use_reentrant=False)  # type: ignore[method-assign]
            fully_shard(part, mesh=meshes.dense, shard_placement_fn=cut)
    for child in module.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=meshes.dense, shard_placement_fn=cut)


def _placement(shards: int, parameter: nn.Parameter) -> Shard:
    own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return Shard(sharded_dimension(own.shape, shards))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _as_it_is(part: nn.Module, *arguments: Any, **options: Any) -> Any:
    """`forward` of the part's class, out of the compiler's reach."""
    return type(part).forward(part, *arguments, **options)


def take_from_first(tensor: Tensor, device: torch.device) -> None:
    """Give a tensor, in place, the first process's values."""
    there = tensor.to(device)
    dist.broadcast(there, 0)
    tensor.copy_(there)


def take_part(device: torch.device, value: Tensor, own: Tensor) -> None:
    """This process's part of the first one's value."""
    there = value.to(device)
    dist.broadcast(there, 0)
    if isinstance(own, DTensor):
        own.to_local().copy_(part_of(there, own))
    else:
        own.copy_(there)
