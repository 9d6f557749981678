"""Experts whose weights are shared out: each process holds, and computes with, a run of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from switchkit.experts.base import Experts
from switchkit.parallel.mesh import check_experts

__all__ = ["shard_experts", "stacked"]


def shard_experts(name: str, experts: Experts, mesh: DeviceMesh) -> None:
    """Share out the stacked weights ``[E, ...]`` of a layer's experts over the processes of a mesh, in place.

    The parameters become DTensors on the expert dimension, with the values of the first process. The experts then take
    rows of this process's run of them, as `Exchange` gives them, and compute with plain local tensors. What every token
    meets beside its routed experts (`always_parameters`) stays whole.

    Each process of the mesh adds the gradient of its own loss to that of an expert, where a parameter that all hold has
    the mean over the processes: gradients are divided by the size of the mesh, so that both are means.

    Args:
        name: of the layer, for errors.
        experts: of the layer.
        mesh: one-dimensional.

    Raises:
        ValueError: experts that cannot be shared out evenly, or whose weights are not stacked.
    """
    check_experts(name, experts.num_experts, mesh.size())
    for owner, names in _owners(name, experts):
        for own in names:
            whole = owner.get_parameter(own)
            part = distribute_tensor(whole.detach(), mesh, [Shard(0)])
            owner.register_parameter(own, nn.Parameter(part, requires_grad=whole.requires_grad))
        # Set on the instance: its class stays what it is, and FSDP's hooks run around it.
        owner.forward = partial(_local_forward, type(owner), owner, 1 / mesh.size())


def stacked(name: str, experts: Experts) -> list[nn.Module]:
    """The modules that hold the stacked weights of routed experts.

    Raises:
        ValueError: weights that are not stacked, or always-on ones on the same module.
    """
    return [owner for owner, _ in _owners(name, experts)]


def _owners(name: str, experts: Experts) -> list[tuple[nn.Module, list[str]]]:
    """The modules that hold the weights of routed experts, and their names there."""
    shared = {id(parameter) for parameter in experts.always_parameters()}
    found = []
    for path, part in experts.named_modules():
        names = [own for own, p in part.named_parameters(recurse=False) if id(p) not in shared]
        for own in names:
            shape = list(part.get_parameter(own).shape)
            if not shape or shape[0] != experts.num_experts:
                raise ValueError(
                    f"{type(experts).__name__} cannot be shared out over processes: {name}.experts"
                    f"{'.' + path if path else ''}.{own} is {shape}, where expert parallelism needs weights stacked as "
                    f"[{experts.num_experts}, ...], one for each expert: use experts such as mlp or gated_mlp, or "
                    "expert_parallel_size=1"
                )
        beside = [own for own, p in part.named_parameters(recurse=False) if id(p) in shared]
        if names and beside:
            # What holds stacked weights is sharded whole, and these are read outside its forward pass.
            raise ValueError(
                f"{type(experts).__name__} cannot be shared out over processes: {name}.experts"
                f"{'.' + path if path else ''} holds {beside[0]}, which every token meets, beside stacked weights: put "
                "it into a child module, or use expert_parallel_size=1"
            )
        if names:
            found.append((part, names))
    return found


def _local_forward(cls: type[nn.Module], module: nn.Module, scale: float, *arguments: Any, **options: Any) -> Any:
    """`forward` of the class on a twin of the module that has this process's experts as plain tensors."""
    twin = object.__new__(cls)
    twin.__dict__.update(module.__dict__)
    del twin.__dict__["forward"]
    twin.__dict__["_parameters"] = {
        name: _Scaled.apply(p.to_local(), scale) if isinstance(p, DTensor) else p
        for name, p in module._parameters.items()
    }
    return twin.forward(*arguments, **options)


class _Scaled(torch.autograd.Function):
    """The tensor itself; its gradient times a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None
