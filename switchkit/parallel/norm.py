"""The norm of all gradients, whatever process holds which part of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["clip_norm", "total_norm"]


@torch.no_grad()
def total_norm(parameters: Iterable[nn.Parameter]) -> Float[Tensor, ""]:
    """The L2 norm of the gradients of all parameters together, the same number on every process.

    Of sharded gradients (DTensors, of any mesh each) every element counts once, however many processes hold a copy:
    each adds its squares divided by the number of copies, in one all-reduce over all processes. Without sharded ones it
    is torch's, and no process is asked.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not any(isinstance(grad, DTensor) for grad in grads):
        return torch.nn.utils.get_total_norm(grads)
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    copies = torch.tensor([_copies(grad) for grad in grads], dtype=torch.float64, device=local[0].device)
    norms = torch.stack([norm.double() for norm in torch._foreach_norm(local)])
    squares = (norms.square() / copies).sum()
    dist.all_reduce(squares)
    return squares.sqrt().float()


@torch.no_grad()
def clip_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Float[Tensor, ""]:
    """Scale the gradients so that their norm is at most `max_norm`; returns the norm before.

    As `torch.nn.utils.clip_grad_norm_`, for gradients of several meshes too.
    """
    parameters = list(parameters)
    norm = total_norm(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    if not any(isinstance(grad, DTensor) for grad in grads):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads], scale)
    return norm


def _copies(grad: Tensor) -> int:
    """Processes that hold the same part of a gradient."""
    copies = dist.get_world_size()
    if isinstance(grad, DTensor):
        for dimension, placement in enumerate(grad.placements):
            if not placement.is_replicate():
                copies //= grad.device_mesh.size(dimension)
    return copies
