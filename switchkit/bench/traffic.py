"""What a training step sends to other processes: bytes and collectives counted, time under way measured."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Traffic", "covered", "under_way"]


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, while it is entered, the collectives that this process takes part in and the bytes that it sends.

    Of n processes each sends what the algorithms of least traffic send: 2 (n - 1) / n of what is all-reduced,
    (n - 1) / n of what an all-gather results in, of what is reduced and scattered, and of what is broadcast; of an
    all-to-all, the rows for others. Gloo itself may send more: it scatters the result of an all-reduce.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).partition(".default")[0]
        if func.namespace in ("c10d", "_c10d_functional") and name not in _SILENT:
            rule = _RULES.get(name)
            if rule is None:
                self.unknown.add(name)
            else:
                kind, size = rule(*args)
                self.calls[kind] += 1
                self.sent[kind] += round(size)
        return func(*args, **(kwargs or {}))


def under_way(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """The share of the time of so many steps in which a collective was under way, by torch's profiler.

    From its start to its end, waiting for slower processes included, whether or not this process computed meanwhile.
    """
    on_device = device.type == "cuda"
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_device else [])
    with profile(activities=kinds) as found:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        if on_device:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    if on_device:
        events = [e for e in found.events() if e.device_type.name == "CUDA" and e.name.startswith("ncclDevKernel")]
    else:
        events = [e for e in found.events() if e.name.startswith("gloo:")]
    return min(1.0, 1e-6 * covered((e.time_range.start, e.time_range.end) for e in events) / seconds)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals: what overlaps counts once."""
    total, until = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _bytes(what: Tensor | list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in ([what] if isinstance(what, Tensor) else what))


def _others(group: Any) -> float:
    """The share of the other processes of a group."""
    return 1 - 1 / dist.ProcessGroup.unbox(group).size()


def _all_to_all(out: Tensor, x: Tensor, group: Any, arrive: list[int], leave: list[int], *_: Any) -> tuple[str, float]:
    if not leave:
        return "all_to_all", _others(group) * _bytes(x)
    own = leave[dist.ProcessGroup.unbox(group).rank()]
    return "all_to_all", _bytes(x) * (1 - own / max(1, sum(leave)))


_SILENT = ("c10d.barrier", "c10d.monitored_barrier_", "_c10d_functional.wait_tensor")
_RULES: dict[str, Callable[..., tuple[str, float]]] = {
    "c10d.allreduce_": lambda x, group, *_: ("all_reduce", 2 * _others(group) * _bytes(x)),
    "c10d.broadcast_": lambda x, group, *_: ("broadcast", _others(group) * _bytes(x)),
    "c10d._allgather_base_": lambda out, x, group, *_: ("all_gather", _others(group) * _bytes(out)),
    "c10d._reduce_scatter_base_": lambda out, x, group, *_: ("reduce_scatter", _others(group) * _bytes(x)),
    "c10d.alltoall_base_": _all_to_all,
}
