"""The base of the metrics here: states that are sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["Sums"]


class Sums(Metric):
    """A metric whose states are sums over batches and ranks.

    Beyond torchmetrics: a model that is cast to bfloat16 does not cast them, since such sums soon stop growing; one
    that was reset in inference mode can go on outside it; and `compute` keeps its shapes where a model has one layer.
    """

    full_state_update = False

    def add_sum(self, name: str, *shape: int, dtype: torch.dtype = torch.long) -> None:
        """A state of zeros, in a dtype that holds the sum of all that comes."""
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def reset(self) -> None:
        with torch.inference_mode(False):
            super().reset()

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> Self:
        states = {name: getattr(self, name) for name in self._defaults}
        super()._apply(fn, exclude_state)
        for name, before in states.items():
            if (moved := getattr(self, name)).dtype != before.dtype:
                setattr(self, name, before.to(moved.device))
                self._defaults[name] = torch.zeros_like(getattr(self, name))
        return self

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        shapes: dict[str, torch.Size] = {}

        def noted() -> Any:
            found = compute()
            shapes.update({name: value.shape for name, value in _named(found).items()})
            return found

        squeezed = super()._wrap_compute(noted)

        def wrapped() -> Any:
            found = {name: value.view(shapes[name]) for name, value in _named(squeezed()).items()}
            return found.get("", found)

        return wrapped


def _named(found: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    return found if isinstance(found, dict) else {"": found}
