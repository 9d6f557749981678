"""The activation of gated experts."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchkit.experts.base import ACTIVATIONS, Activation
from switchkit.kernels.usable import usable

__all__ = ["gated"]


def gated(hidden: Float[Tensor, "*layout F2"], activation: Activation) -> Float[Tensor, "*layout F"]:
    """``act(gate) * value`` of rows that hold the gate in their first half and the value in the second.

    On a GPU one pass over memory instead of two, and one instead of five for the gradient, for which the rows alone are
    kept; there differentiable once.
    """
    if usable(hidden):
        return _Gated.apply(hidden, activation)  # type: ignore[no-untyped-call]
    gate, value = hidden.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * value


class _Gated(torch.autograd.Function):
    """By kernels."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, activation: Activation) -> Tensor:
        from switchkit.kernels.gated import gated as kernel

        ctx.save_for_backward(hidden)
        ctx.activation = activation
        return kernel(hidden, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        from switchkit.kernels.gated import gated_backward

        (hidden,) = ctx.saved_tensors
        return gated_backward(grad, hidden, ctx.activation), None
