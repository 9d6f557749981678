"""The activation of gated experts and its gradient, each in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from switchkit.kernels.launch import block_of, sums_in

__all__ = ["gated", "gated_backward"]


def gated(hidden: Float[Tensor, "*layout F2"], activation: str) -> Float[Tensor, "*layout F"]:
    """``act(gate) * value`` of rows that hold a gate in their first half and a value in the second."""
    width = hidden.shape[-1] // 2
    out = hidden.new_empty(*hidden.shape[:-1], width)
    if out.numel():
        block = block_of(width)
        _gated[(out.numel() // width, triton.cdiv(width, block["BLOCK"]))](
            hidden.contiguous(), out, WIDTH=width, ACT=activation, SUMS=sums_in(hidden), **block
        )
    return out


def gated_backward(
    grad: Float[Tensor, "*layout F"], hidden: Float[Tensor, "*layout F2"], activation: str
) -> Float[Tensor, "*layout F2"]:
    """The gradient of `gated` for its rows."""
    width = grad.shape[-1]
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if grad.numel():
        block = block_of(width)
        _gated_backward[(grad.numel() // width, triton.cdiv(width, block["BLOCK"]))](
            grad.contiguous(),
            hidden.contiguous(),
            grad_hidden,
            WIDTH=width,
            ACT=activation,
            SUMS=sums_in(hidden),
            **block,
        )
    return grad_hidden


@triton.jit
def _activate(x, ACT: tl.constexpr):
    """The activation and its derivative."""
    if ACT == "relu":
        y = tl.where(x > 0, x, 0.0)
        slope = tl.where(x > 0, 1.0, 0.0)
    elif ACT == "silu":
        s = 1 / (1 + tl.exp(-x))
        y = x * s
        slope = s * (1 + x * (1 - s))
    elif ACT == "quick_gelu":
        s = 1 / (1 + tl.exp(-1.702 * x))
        y = x * s
        slope = s * (1 + 1.702 * x * (1 - s))
    elif ACT == "gelu":
        below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        y = x * below
        slope = below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:  # gelu_tanh: (1 + tanh(u)) / 2 is the logistic function of 2 u
        u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        s = 1 / (1 + tl.exp(-u))
        y = x * s
        slope = s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    return y, slope


@triton.jit
def _gated(hidden, out, WIDTH: tl.constexpr, ACT: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = hidden + row * 2 * WIDTH + column
    gate = tl.load(at, mask=inside, other=0.0).to(SUMS)
    value = tl.load(at + WIDTH, mask=inside, other=0.0).to(SUMS)
    open, _ = _activate(gate, ACT)
    tl.store(out + row * WIDTH + column, (open * value).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward(
    grad, hidden, grad_hidden, WIDTH: tl.constexpr, ACT: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = row * 2 * WIDTH + column
    gate = tl.load(hidden + at, mask=inside, other=0.0).to(SUMS)
    value = tl.load(hidden + at + WIDTH, mask=inside, other=0.0).to(SUMS)
    slope = tl.load(grad + row * WIDTH + column, mask=inside, other=0.0).to(SUMS)
    open, derivative = _activate(gate, ACT)
    kind = grad_hidden.dtype.element_ty
    tl.store(grad_hidden + at, (slope * value * derivative).to(kind), mask=inside)
    tl.store(grad_hidden + at + WIDTH, (slope * open).to(kind), mask=inside)
