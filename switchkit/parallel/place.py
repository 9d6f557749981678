"""Whole tensors into sharded ones, without communication: each process takes its part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["part_like", "part_of", "state_like"]


def part_of(whole: Tensor, like: DTensor) -> Tensor:
    """The part of the whole tensor that this process holds where it is sharded as `like` is; a view."""
    (held,) = like.__create_chunk_list__()  # type: ignore[no-untyped-call]
    part = whole
    for dimension, (size, start) in enumerate(zip(held.sizes, held.offsets, strict=True)):
        # A process beyond the last row has none.
        part = part.narrow(dimension, min(start, part.shape[dimension]), size)
    return part


def part_like(whole: Tensor, like: DTensor) -> DTensor:
    """The whole tensor, sharded as `like` is; its dtype stays."""
    local = part_of(whole, like).contiguous().clone().to(like.device)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def state_like(state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """A state_dict with whole tensors where `module` has sharded parameters: each process's part of them."""
    own = {name: parameter for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)}
    found = dict(state)
    for name, parameter in own.items():
        value = state.get(name)
        if isinstance(value, Tensor) and not isinstance(value, DTensor) and value.shape == parameter.shape:
            found[name] = part_like(value, parameter)
    return found
