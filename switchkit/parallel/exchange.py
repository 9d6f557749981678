"""Tokens to the processes that hold their experts, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchkit.dispatch.base import Dispatcher
from switchkit.records import Routing, Rows

__all__ = ["Exchange", "Exchanged"]


@dataclass(frozen=True)
class Exchanged(Rows):
    """The rows of this process's experts, sorted by expert, from all processes of the group."""

    inner: Rows | None = None
    """What the inner dispatcher made of this process's own tokens."""
    order: Int[Tensor, "R"] | None = None
    """Which arrival each row was; arrivals run process by process, and within one expert by expert."""
    back: Int[Tensor, "R"] | None = None
    """Which row each arrival became."""
    sent: tuple[int, ...] = ()
    """Rows that went to each process ..."""
    arrived: tuple[int, ...] = ()
    """... and that came from each."""


class Exchange(Dispatcher):
    """Wraps a dispatcher for experts that are shared out over a process group: process p holds the p-th run of them.

    The inner dispatcher arranges this process's tokens for all E experts, after the drop; what it arranged is sent to
    the processes that hold the experts (all-to-all with uneven splits), computed there, and sent back. A process waits
    for its device once per layer, to read how much it sends and gets. No rows at all are fine.

    The result is that of the inner dispatcher with all experts in one place, in outputs and in the gradients of tokens
    and router. The gradients of a process's experts are the sums over the losses of all processes of the group, where
    its other gradients are those of its own loss.

    Args:
        inner: the layer's own dispatcher.
        group: the processes that the experts are shared out over, in order.

    Source: arXiv 2006.16668 (GShard), section 3.1; uneven splits as in arXiv 2211.15841 (MegaBlocks).
    """

    def __init__(self, inner: Dispatcher, group: dist.ProcessGroup) -> None:
        self.inner, self.group = inner, group

    def dispatch(self, tokens: Float[Tensor, "G S D"], routing: Routing) -> Exchanged:
        rows = self.inner.dispatch(tokens, routing)
        x, load = rows.x, rows.load
        if x.dim() == 3:
            # Every row of a buffer travels: those past an expert's load come back as what nobody reads.
            load = torch.full_like(load, x.shape[1])
            x = x.flatten(0, 1)
        processes = dist.get_world_size(self.group)
        counts = torch.empty_like(load)
        dist.all_to_all_single(counts, load.contiguous(), group=self.group)
        counts = counts.view(processes, -1)
        mine, theirs = torch.stack([load.view(processes, -1), counts]).tolist()
        sent, arrived = tuple(map(sum, mine)), tuple(map(sum, theirs))
        x = _AllToAll.apply(x[: sum(sent)], sent, arrived, self.group)  # type: ignore[no-untyped-call]
        local = counts.shape[1]
        expert = torch.arange(local, device=x.device).repeat(processes)
        expert = expert.repeat_interleave(counts.flatten(), output_size=sum(arrived))
        order = expert.argsort(stable=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return Exchanged(
            x=_Reorder.apply(x, order, back),  # type: ignore[no-untyped-call]
            load=counts.sum(0),
            sizes=tuple(map(sum, zip(*theirs, strict=True))) if _reads_sizes(x) else None,
            inner=rows,
            order=order,
            back=back,
            sent=sent,
            arrived=arrived,
        )

    def combine(self, out: Float[Tensor, "*layout D"], rows: Rows, routing: Routing) -> Float[Tensor, "G S D"]:
        assert isinstance(rows, Exchanged)
        assert rows.inner is not None
        y = _Reorder.apply(out, rows.back, rows.order)  # type: ignore[no-untyped-call]
        y = _AllToAll.apply(y, rows.arrived, rows.sent, self.group)  # type: ignore[no-untyped-call]
        shape = rows.inner.x.shape[:-1]
        if len(shape) == 1:
            y = torch.cat([y, y.new_zeros(shape[0] - len(y), y.shape[1])])
        return self.inner.combine(y.view(*shape, y.shape[-1]), rows.inner, routing)


def _reads_sizes(x: Tensor) -> bool:
    """Whether experts are told the integers: not where they compute with loads that stay on the device."""
    half = x.dtype == torch.bfloat16 or torch.is_autocast_enabled(x.device.type)
    return not (x.device.type == "cuda" and half)


class _AllToAll(torch.autograd.Function):
    """Runs of rows to each process of a group; the gradients take the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: tuple[int, ...], arrived: tuple[int, ...], group: Any) -> Tensor:
        ctx.sent, ctx.arrived, ctx.group = sent, arrived, group
        return _all_to_all(x, sent, arrived, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.arrived, ctx.sent, ctx.group), None, None, None


def _all_to_all(x: Tensor, sent: tuple[int, ...], arrived: tuple[int, ...], group: Any) -> Tensor:
    y = x.new_empty(sum(arrived), x.shape[1])
    dist.all_to_all_single(y, x.contiguous(), list(arrived), list(sent), group=group)
    return y


class _Reorder(torch.autograd.Function):
    """A permutation whose gradient is a gather too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back), None, None
