"""Memory: what a layer keeps for its backward pass, and what it needs at its peak."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from switchkit.bench.shapes import Shape

__all__ = ["needed", "peak_bytes", "room", "saved_bytes"]


def saved_bytes(forward: Callable[[], Tensor], spare: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, those of `spare` (input, weights) left out.

    Exact and the same in every run; buffers that live within an operation are not in it.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in spare}
    # The storages themselves, so that no address is used twice while we count.
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del out
    return total


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes that torch had allocated on a CUDA device during `run`, above what it had before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def needed(dispatcher: str, shape: Shape, groups: tuple[int, int], itemsize: int, device: str) -> int:
    """Bytes of the largest tensor that a dispatcher of ours would make at a dropless layer; 0: linear in the tokens."""
    count, length = groups
    assignments = length * shape.k
    if dispatcher == "einsum":
        # On a CPU the buffer is as long as the largest load; elsewhere as long as it could be.
        slots = assignments if device != "cpu" else -(-2 * assignments // shape.experts)
        return count * length * shape.experts * max(assignments, slots) * itemsize
    if dispatcher == "padded" and device != "cpu":
        widest = max(shape.d_model, (2 if shape.gated else 1) * shape.d_ff)
        return shape.experts * count * assignments * widest * itemsize
    return 0


def room(device: torch.device) -> int:
    """Bytes that one tensor may take here, above which a contestant is left out."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 16
    return 512 * 2**20
