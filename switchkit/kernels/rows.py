"""Rows of experts: back to their tokens, and cleared where no expert wrote them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from switchkit.kernels.launch import block_of, sums_in

__all__ = ["clear_idle", "clear_tail", "weighted_sum", "weighted_sum_backward"]


def weighted_sum(
    rows: Float[Tensor, "R D"], weight: Float[Tensor, "T K"] | None, row: Int[Tensor, "T K"]
) -> Float[Tensor, "T D"]:
    """``sum_j weight[t, j] * rows[row[t, j]]`` in one pass, in the dtype of the rows; weights of None: 1."""
    tokens, k = row.shape
    width = rows.shape[1]
    out = rows.new_empty(tokens, width)
    if out.numel():
        block = block_of(width)
        _weighted_sum[(tokens, triton.cdiv(width, block["BLOCK"]))](
            rows.contiguous(),
            row if weight is None else weight.contiguous(),
            row.contiguous(),
            out,
            WIDTH=width,
            K=k,
            WEIGHTED=weight is not None,
            SUMS=sums_in(rows),
            **block,
        )
    return out


def weighted_sum_backward(
    grad: Float[Tensor, "T D"],
    rows: Float[Tensor, "R D"],
    weight: Float[Tensor, "T K"],
    source: Int[Tensor, "R"],
) -> tuple[Float[Tensor, "R D"], Float[Tensor, "R"]]:
    """Of `weighted_sum`: each row's gradient, and the gradient of the weight that row `r` had, by rows.

    `source` is the flat index of the weight of each row.
    """
    count, width = rows.shape
    grad_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
    product = torch.empty(count, dtype=weight.dtype, device=rows.device)
    if count:
        _weighted_sum_backward[(count,)](
            grad.contiguous(),
            rows.contiguous(),
            weight.contiguous(),
            source,
            grad_rows,
            product,
            WIDTH=width,
            K=weight.shape[1],
            SUMS=sums_in(rows),
            **block_of(width),
        )
    return grad_rows, product


def clear_tail(rows: Float[Tensor, "R D"], ends: Int[Tensor, "E"]) -> Float[Tensor, "R D"]:
    """Zeros, in place, in the rows past the last end; what lies before is neither read nor written."""
    count, width = rows.shape
    if count and width:
        step = 32
        _clear_tail[(triton.cdiv(count, step),)](
            rows, ends, len(ends) - 1, count, WIDTH=width, ROWS=step, BLOCK=min(256, triton.next_power_of_2(width))
        )
    return rows


def clear_idle(weight: Float[Tensor, "E I O"], load: Int[Tensor, "E"]) -> Float[Tensor, "E I O"]:
    """Zeros, in place, for experts without a row; the others are neither read nor written."""
    size = weight[0].numel()
    if size:
        block, steps = 1024, 64
        _clear_idle[(len(weight), triton.cdiv(size, block * steps))](weight, load, size, STEPS=steps, BLOCK=block)
    return weight


@triton.jit
def _weighted_sum(
    rows,
    weight,
    row,
    out,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros([BLOCK], dtype=SUMS)
    for j in tl.static_range(K):
        at = tl.load(row + token * K + j)
        value = tl.load(rows + at * WIDTH + column, mask=inside, other=0.0).to(SUMS)
        if WEIGHTED:
            value *= tl.load(weight + token * K + j).to(SUMS)
        total += value
    tl.store(out + token * WIDTH + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weighted_sum_backward(
    grad,
    rows,
    weight,
    source,
    grad_rows,
    product,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    choice = tl.load(source + row)
    scale = tl.load(weight + choice).to(SUMS)
    token = choice // K
    total = tl.zeros([BLOCK], dtype=SUMS)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        slope = tl.load(grad + token * WIDTH + column, mask=inside, other=0.0).to(SUMS)
        value = tl.load(rows + row * WIDTH + column, mask=inside, other=0.0).to(SUMS)
        tl.store(grad_rows + row * WIDTH + column, (scale * slope).to(grad_rows.dtype.element_ty), mask=inside)
        total += slope * value
    tl.store(product + row, tl.sum(total, axis=0).to(product.dtype.element_ty))


@triton.jit
def _clear_tail(rows, ends, last, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0) * ROWS
    used = tl.load(ends + last)
    if first + ROWS > used:
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        spare = (row >= used) & (row < count)
        for start in range(0, WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            zero = tl.zeros([ROWS, BLOCK], dtype=rows.dtype.element_ty)
            tl.store(rows + row * WIDTH + column, zero, mask=spare & (column < WIDTH))


@triton.jit
def _clear_idle(weight, load, size, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    expert = tl.program_id(0).to(tl.int64)
    if tl.load(load + expert) == 0:
        begin = tl.program_id(1).to(tl.int64) * STEPS * BLOCK
        for step in range(STEPS):
            place = begin + step * BLOCK + tl.arange(0, BLOCK)
            zero = tl.zeros([BLOCK], dtype=weight.dtype.element_ty)
            tl.store(weight + expert * size + place, zero, mask=place < size)
