"""Rows sorted by expert: no padding, memory linear in the tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchkit.dispatch.base import (
    Dispatcher,
    flat_tokens,
    kept_load,
    mix_slots,
    placed,
    starts,
    sum_choices,
    unmix_slots,
)
from switchkit.dispatch.filling import evened, filling, shifts
from switchkit.kernels.usable import usable
from switchkit.records import Routing, Rows
from switchkit.registry import register

__all__ = ["Sorted"]


@register("sorted")
class Sorted(Dispatcher):
    """The default: rows of expert 0, then of expert 1, ..., with what was not kept at the end.

    The number of rows is the number of assignments, whatever the data, so nothing waits for the device. On a CPU the
    loads are read as integers too, for experts that loop over them; and where several threads would share each of many
    small products, loads of neighbours that differ by little are filled up to the largest with rows of zeros, which
    count as load: such neighbours are one batched product, in which the threads share the experts.

    Source: the "permute" of arXiv 2211.15841 (MegaBlocks); one sort by (group, expert) serves slots and rows alike.
    """

    def dispatch(self, tokens: Float[Tensor, "G S D"], routing: Routing) -> Rows:
        if routing.share is not None:
            return mix_slots(tokens, routing)
        slot, kept, _ = placed(routing)
        load = kept_load(routing)
        sizes = zeros = None
        if usable(tokens):
            from switchkit.kernels.order import arrange

            row, source, per_expert = arrange(routing.expert, slot, kept, load)
        else:
            per_expert = load.sum(0)
            known = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
            sizes = tuple(per_expert.tolist()) if known else None
            filled = None if sizes is None or not _full_products(tokens) else evened(sizes, torch.get_num_threads())
            row, source = _arranged(routing, slot, kept, load, sizes, filled)
            if sizes is not None and filled is not None:
                zeros = torch.tensor(filling(sizes, filled))
                sizes, per_expert = filled, torch.tensor(filled)
        if routing.k is None:
            rows = tokens.flatten(0, 1).index_select(0, flat_tokens(routing).flatten().index_select(0, source))
            rows = rows if zeros is None else rows.index_fill(0, zeros, 0)
        else:
            take = _Take.apply if torch.is_grad_enabled() else _take
            rows = take(tokens, row, source, routing.k, zeros)
        return Rows(x=rows, load=per_expert, sizes=sizes, row=row, source=source)

    def combine(self, out: Float[Tensor, "*layout D"], rows: Rows, routing: Routing) -> Float[Tensor, "G S D"]:
        if routing.share is not None:
            return unmix_slots(out, routing)
        assert rows.row is not None
        assert rows.source is not None
        _, kept, _ = placed(routing)
        # The kernel takes weights as the router made them; plain products, those in the dtype of the rows.
        by_kernel = routing.k is not None and usable(out)
        weight = routing.weight if by_kernel else routing.weight.to(out.dtype)
        if not _nothing_dropped(rows.sizes, len(rows.source)):
            weight = weight.masked_fill(~kept, 0)
        if routing.k is None:
            back = out.index_select(0, rows.row.flatten())
            return sum_choices(back * weight.flatten().unsqueeze(-1), routing)
        size = (*routing.valid.shape, out.shape[-1])
        give = _Return.apply if torch.is_grad_enabled() else _return
        y: Tensor = give(out, weight, rows.row, rows.source, routing.k, size)
        return y


def _full_products(tokens: Tensor) -> bool:
    """Whether experts will compute in float32 or float64: batched products in half precision may be slow on a CPU."""
    return tokens.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")


def _arranged(
    routing: Routing,
    slot: Int[Tensor, "G N"],
    kept: Tensor,
    load: Int[Tensor, "G E"],
    sizes: tuple[int, ...] | None,
    filled: tuple[int, ...] | None,
) -> tuple[Int[Tensor, "G N"], Int[Tensor, "R"]]:
    """Where each assignment goes, and which one each row comes from; 0 for rows that fill up."""
    n = routing.expert.numel()
    if n == 1:
        # Decoding one token: one row.
        row = torch.zeros_like(routing.expert)
        return row, row.flatten()
    first, extra = starts(load), 0
    if sizes is not None and filled is not None:
        first, extra = first + torch.tensor(shifts(sizes, filled)), sum(filled) - sum(sizes)
    row = first.gather(1, routing.expert) + slot
    if not _nothing_dropped(sizes, n):
        spare = (~kept).flatten()
        row = torch.where(kept, row, (load.sum() + extra + spare.cumsum(0) - 1).view_as(row))
    flat = row.flatten()
    # Zeros: with slots that a capacity policy gave twice, a row that nothing fills reads a token, not stray memory.
    source = flat.new_zeros(n + extra).scatter_(0, flat, torch.arange(n, device=flat.device))
    return row, source


def _nothing_dropped(sizes: tuple[int, ...] | None, rows: int) -> bool:
    """True: every assignment is kept, as far as can be told without a wait for the device."""
    return sizes is not None and sum(sizes) == rows


def _weighted_sum(rows: Float[Tensor, "R D"], weight: Tensor | None, row: Int[Tensor, "T K"]) -> Float[Tensor, "T D"]:
    """``sum_j weight[t, j] * rows[row[t, j]]``."""
    by_kernel = usable(rows)
    if row.shape[1] == 1 and not (by_kernel and weight is not None):
        y = rows.index_select(0, row.flatten())
        return y if weight is None else y.mul_(weight)
    if by_kernel:
        from switchkit.kernels.rows import weighted_sum

        return weighted_sum(rows, weight, row)
    if rows.device.type == "cpu" and row.numel():
        # A gather, product and sum in one pass: 10 times an indexed addition.
        return F.embedding_bag(row, rows, per_sample_weights=weight, mode="sum")
    y = rows.index_select(0, row.flatten()).view(*row.shape, rows.shape[-1])
    return y.sum(1) if weight is None else torch.einsum("tkd,tk->td", y, weight)


def _token(source: Int[Tensor, "R"], k: int) -> Int[Tensor, "R"]:
    """Which token each row came from."""
    return source if k == 1 else source // k


def _take(tokens: Tensor, row: Tensor, source: Tensor, k: int, zeros: Tensor | None) -> Tensor:
    rows = tokens.flatten(0, 1).index_select(0, _token(source, k))
    return rows if zeros is None else rows.index_fill_(0, zeros, 0)


def _return(out: Tensor, weight: Tensor, row: Tensor, source: Tensor, k: int, size: tuple[int, ...]) -> Tensor:
    return _weighted_sum(out, weight.view(-1, k), row.view(-1, k)).view(size)


class _Take(torch.autograd.Function):
    """Rows from tokens; the gradient of a token is the sum over its rows, gathered rather than scattered."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, row: Tensor, source: Tensor, k: int, zeros: Tensor | None) -> Tensor:
        ctx.save_for_backward(row)
        ctx.k, ctx.size = k, tokens.shape
        return _take(tokens, row, source, k, zeros)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (row,) = ctx.saved_tensors
        if ctx.k > 1:
            return _weighted_sum(grad, None, row.view(-1, ctx.k)).view(ctx.size), None, None, None, None
        # Not a view: autograd then adds the router's gradient to it in place.
        by_token = grad.new_empty(ctx.size)
        torch.index_select(grad, 0, row.flatten(), out=by_token.view(-1, grad.shape[-1]))
        return by_token, None, None, None, None


class _Return(torch.autograd.Function):
    """Tokens of the shape `size` from weighted rows."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, weight: Tensor, row: Tensor, source: Tensor, k: int, size: tuple[int, ...]
    ) -> Tensor:
        # What rows were is in the gradient of their weights alone, which a router without parameters has none of.
        ctx.save_for_backward(out if ctx.needs_input_grad[1] else None, weight, row, source)
        ctx.k = k
        return _return(out, weight, row, source, k, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        out, weight, row, source = ctx.saved_tensors
        if out is not None and usable(out):
            from switchkit.kernels.rows import weighted_sum_backward

            grad_rows, product = weighted_sum_backward(grad.flatten(0, 1), out, weight.view(-1, ctx.k), source)
            return grad_rows, product.take(row), None, None, None, None
        by_row = grad.flatten(0, 1).index_select(0, _token(source, ctx.k))
        # In the rows' order first, then back in the tokens': one gather of the wide gradient serves both.
        grad_weight = None if out is None else torch.linalg.vecdot(by_row, out).take(row)
        # Zero for rows that fill up: nothing came of them.
        of_row = weight.new_zeros(len(source)).scatter_(0, row.flatten(), weight.flatten())
        return by_row.mul_(of_row.unsqueeze(-1)), grad_weight, None, None, None, None
