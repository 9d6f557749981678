"""What an optimizer keeps, found by letting it step on shapes without memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from switchkit.optim import OptimizerFactory, why_whole
from switchkit.plan.units import Shape

__all__ = ["needs_whole", "state_bytes"]


def state_bytes(optimizer: OptimizerFactory, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
    """Bytes of the state of an optimizer that has stepped once on parameters of these shapes.

    Exact for what steps as torch's optimizers do: two numbers for each parameter with Adam (and one for a tensor's
    steps), one with momentum, a row and a column of each matrix with Adafactor.

    Raises:
        ValueError: an optimizer that refuses such parameters, or cannot step on tensors without memory.
    """
    known = {shape: _state(optimizer, shape, dtype) for shape in set(shapes)}
    return sum(known[shape] for shape in shapes)


def needs_whole(optimizer: OptimizerFactory) -> str | None:
    """Why an optimizer does not go with `ExpertParallelStrategy`; None: it does."""
    try:
        return why_whole(optimizer([{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}]))
    except (RuntimeError, TypeError, ValueError):
        return None  # which `state_bytes` tells better


def _state(optimizer: OptimizerFactory, shape: Shape, dtype: torch.dtype) -> int:
    parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
    parameter.grad = torch.empty_like(parameter)
    state: dict[str, Tensor] = {}
    try:
        made = optimizer([{"params": [parameter]}])
        state = made.state[parameter]
        for group in made.param_groups:
            # These paths know devices by name.
            group.update({name: False for name in ("foreach", "fused") if name in group})
        made.step()
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        # Adafactor has made its state when it first asks for a number.
        if not state:
            raise ValueError(f"the optimizer's state of a parameter {list(shape)} is not known: {error}") from error
    return sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, Tensor))
