"""One matrix product per expert, over rows in either layout."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchkit.kernels.precision import autocasts
from switchkit.kernels.usable import usable
from switchkit.records import Rows

__all__ = ["ends_of", "grouped_linear", "grouped_relu_mlp"]

FEW_ROWS = 96
"""Rows per expert below which, on a CPU, one grouped call beats a loop of products (measured by `switchkit bench`)."""


def grouped_linear(
    x: Float[Tensor, "*layout I"],
    rows: Rows,
    weight: Float[Tensor, "E I O"],
    bias: Float[Tensor, "E O"] | None = None,
    ends: Int[Tensor, "E"] | None = None,
) -> Float[Tensor, "*layout O"]:
    """``x[row] @ weight[e] + bias[e]`` for each row of expert e; zeros for rows of no expert. Differentiable once.

    Under autocast it computes in autocast's dtype, as `torch.nn.functional.linear` does. `ends`: `ends_of(rows)`, where
    several products share it.
    """
    if autocasts(x.device):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if x.dim() == 3:
        y = torch.bmm(x, weight)
        return y if bias is None else y + bias.unsqueeze(1).to(y.dtype)
    if rows.sizes is not None:
        y = _Loop.apply(x, weight, rows.sizes)  # type: ignore[no-untyped-call]
    elif _one_call(x, weight):
        y = _OnDevice.apply(x, weight, rows.load, ends_of(rows) if ends is None else ends)  # type: ignore[no-untyped-call]
    else:
        y = loop(x, weight, rows.load)
    if bias is None:
        return y
    # Rows of no expert get the bias of an extra, zero one.
    spare = (x.shape[0] - rows.load.sum()).unsqueeze(0)
    of_row = F.pad(bias, (0, 0, 0, 1)).to(y.dtype)
    return y + of_row.repeat_interleave(torch.cat([rows.load, spare]), 0, output_size=x.shape[0])


def ends_of(rows: Rows) -> Int[Tensor, "E"] | None:
    """Where each expert's rows end, for products whose loads stay on the device; None where the integers are known."""
    if rows.sizes is not None or rows.x.dim() == 3:
        return None
    return rows.load.cumsum(0).to(torch.int32)


def grouped_relu_mlp(
    x: Float[Tensor, "R I"], w1: Float[Tensor, "E I F"], w2: Float[Tensor, "E F O"], sizes: tuple[int, ...]
) -> Float[Tensor, "R O"]:
    """``relu(x[row] @ w1[e]) @ w2[e]`` for rows sorted by expert; zeros for rows of no expert. Differentiable once.

    The same as two `grouped_linear` around a ReLU with less memory to walk through: the activation and its gradient
    are applied in place.
    """
    if not torch.is_grad_enabled():
        return _products(_products(x, w1, sizes).relu_(), w2, sizes)
    return _ReluMlp.apply(x, w1, w2, sizes)  # type: ignore[no-untyped-call]


def _products(x: Tensor, weight: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Row blocks times their expert's matrix, into one buffer whose spare rows are zero."""
    if len(x) in sizes:
        # One expert has all rows: what a dense layer does.
        return torch.mm(x, weight[sizes.index(len(x))])
    used = sum(sizes)
    runs = _runs(x, sizes)
    if runs is not None:
        out = x.new_empty(x.shape[0], weight.shape[2])
        for experts, here, layout in runs:
            if layout[1]:
                torch.bmm(x[here].view(*layout, -1), weight[experts], out=out[here].view(*layout, -1))
        out[used:] = 0
        return out
    few = _few(x, weight, used)
    if few and used == x.shape[0]:
        return F.grouped_mm(x, weight, offs=_ends(sizes))
    out = x.new_empty(x.shape[0], weight.shape[2])
    if few:
        out[:used] = F.grouped_mm(x[:used], weight, offs=_ends(sizes))
    elif used < len(sizes):
        # Decoding token by token: most experts have nothing to do.
        start = 0
        for expert, size in enumerate(sizes):
            if size:
                torch.mm(x[start : start + size], weight[expert], out=out[start : start + size])
                start += size
    else:
        blocks = zip(
            x[:used].split_with_sizes(sizes), weight.unbind(0), out[:used].split_with_sizes(sizes), strict=True
        )
        for rows, matrix, product in blocks:
            if len(rows):
                torch.mm(rows, matrix, out=product)
    if used < len(out):
        out[used:] = 0
    return out


def _weight_gradient(x: Tensor, grad: Tensor, weight: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """``x^T grad`` of each expert's block; zeros for an expert without rows."""
    used = sum(sizes)
    runs = _runs(x, sizes)
    if runs is not None:
        out = torch.empty_like(weight)
        for experts, here, layout in runs:
            if layout[1]:
                rows, block = x[here].view(*layout, -1), grad[here].view(*layout, -1)
                torch.bmm(rows.transpose(1, 2), block, out=out[experts])
            else:
                out[experts] = 0
        return out
    if _few(x, weight, used) and all(sizes):
        return F.grouped_mm(x[:used].t(), grad[:used], offs=_ends(sizes))
    out = torch.empty_like(weight)
    blocks = zip(x[:used].split_with_sizes(sizes), grad[:used].split_with_sizes(sizes), out.unbind(0), strict=True)
    for rows, block, matrix in blocks:
        if len(rows):
            torch.mm(rows.t(), block, out=matrix)
        else:
            matrix.zero_()
    return out


def _runs(x: Tensor, sizes: tuple[int, ...]) -> list[tuple[slice, slice, tuple[int, int]]] | None:
    """Neighbours of equal loads, each run of them one batched product: its experts, its rows, and (experts, rows each).

    None where runs are short, or in half precision, whose batched products may be slow on a CPU.
    """
    if x.dtype not in (torch.float32, torch.float64):
        return None
    runs, first, start = [], 0, 0
    for size, equal in groupby(sizes):
        count = sum(1 for _ in equal)
        runs.append((slice(first, first + count), slice(start, start + count * size), (count, size)))
        first, start = first + count, start + count * size
    return runs if 2 * len(runs) <= len(sizes) else None


def _few(x: Tensor, weight: Tensor, used: int) -> bool:
    """True where one call for all experts is faster than a loop and allowed (strides of 16 bytes, some rows)."""
    few = weight.shape[0] <= used < FEW_ROWS * weight.shape[0]
    return x.device.type == "cpu" and x.dtype == torch.float32 and few and _in_16_bytes(x, weight)


def _one_call(x: Tensor, weight: Tensor) -> bool:
    """True where a GPU has one call for all experts that reads the loads itself: bfloat16 rows of whole 16 bytes."""
    return x.device.type == "cuda" and x.dtype == torch.bfloat16 and _in_16_bytes(x, weight)


def _in_16_bytes(x: Tensor, weight: Tensor) -> bool:
    """Whether every row of the inputs and outputs starts at a multiple of 16 bytes, as `grouped_mm` wants it."""
    step = 16 // x.element_size()
    return weight.shape[1] % step == 0 and weight.shape[2] % step == 0


def _ends(sizes: tuple[int, ...]) -> Int[Tensor, "E"]:
    return torch.tensor(sizes).cumsum(0).to(torch.int32)


class _Loop(torch.autograd.Function):
    """The products where sizes are known: a loop over experts without a copy of any slice of the weights.

    Indexing a stacked parameter in a loop would make autograd fill a full-size gradient per expert.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        return _products(x, weight, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = _products(grad, weight.transpose(1, 2), ctx.sizes) if ctx.needs_input_grad[0] else None
        grad_weight = _weight_gradient(x, grad, weight, ctx.sizes) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


class _ReluMlp(torch.autograd.Function):
    """Two products with a ReLU between them, of which only what it lets through is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, w2: Tensor, sizes: tuple[int, ...]) -> Tensor:
        hidden = _products(x, w1, sizes).relu_()
        ctx.save_for_backward(x, w1, w2, hidden)
        ctx.sizes = sizes
        return _products(hidden, w2, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, w1, w2, hidden = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_w1 = None
        grad_w2 = _weight_gradient(hidden, grad, w2, ctx.sizes) if ctx.needs_input_grad[2] else None
        if any(ctx.needs_input_grad[:2]):
            inner = _products(grad, w2.transpose(1, 2), ctx.sizes)
            # The hidden rows are positive exactly where their ReLU let the gradient through.
            torch.ops.aten.threshold_backward.grad_input(inner, hidden, 0, grad_input=inner)
            grad_w1 = _weight_gradient(x, inner, w1, ctx.sizes) if ctx.needs_input_grad[1] else None
            grad_x = _products(inner, w1.transpose(1, 2), ctx.sizes) if ctx.needs_input_grad[0] else None
        return grad_x, grad_w1, grad_w2, None


class _OnDevice(torch.autograd.Function):
    """The products with loads that stay on the device: no wait for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, load: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, load, ends)
        return _clear(F.grouped_mm(x, weight, offs=ends), ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, load, ends = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _clear(F.grouped_mm(grad, weight.transpose(1, 2), offs=ends), ends)
        if ctx.needs_input_grad[1]:
            grad_weight = _clear_idle(F.grouped_mm(x.t(), grad, offs=ends), load)
        return grad_x, grad_weight, None, None


def _clear(rows: Tensor, ends: Tensor) -> Tensor:
    """Zeros in the rows past the last end, which `grouped_mm` leaves as the memory was."""
    if usable(rows):
        from switchkit.kernels.rows import clear_tail

        return clear_tail(rows, ends)
    spare = torch.arange(rows.shape[0], device=rows.device) >= ends[-1]
    # Not in place: of a function that writes to what it returns, torch.compile of torch 2.11 makes the gradient zero.
    return rows.masked_fill(spare.unsqueeze(-1), 0)


def _clear_idle(grad_weight: Tensor, load: Tensor) -> Tensor:
    """Zeros for experts without rows, which get memory as it was."""
    if usable(grad_weight):
        from switchkit.kernels.rows import clear_idle

        return clear_idle(grad_weight, load)
    return grad_weight.masked_fill((load == 0).view(-1, 1, 1), 0)


# They wait for the device, and so stand between the parts of a model that CUDA graphs record.
@torch.library.custom_op("switchkit::grouped_linear", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def loop(x: Tensor, weight: Tensor, load: Tensor) -> Tensor:
    """The loop as one operator that torch.compile takes as it is; reads the loads, so on a GPU it waits for them."""
    return _products(x, weight, tuple(load.tolist()))


@torch.library.custom_op(
    "switchkit::grouped_linear_weight_gradient", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def loop_weight_gradient(x: Tensor, grad: Tensor, weight: Tensor, load: Tensor) -> Tensor:
    """The gradient of `loop` for its weight."""
    return _weight_gradient(x, grad.contiguous(), weight, tuple(load.tolist()))


@loop.register_fake
def _(x: Tensor, weight: Tensor, load: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@loop_weight_gradient.register_fake
def _(x: Tensor, grad: Tensor, weight: Tensor, load: Tensor) -> Tensor:
    return torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _loop_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, load = ctx.saved_tensors
    return loop(grad.contiguous(), weight.transpose(1, 2), load), loop_weight_gradient(x, grad, weight, load), None


loop.register_autograd(_loop_backward, setup_context=_keep)
