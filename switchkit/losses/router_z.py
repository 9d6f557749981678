"""The loss that keeps router logits small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from switchkit.checks import one_of
from switchkit.losses.base import Loss, by_stack, check_stacks, over_layers
from switchkit.records import Routing, mean_square_logsumexp
from switchkit.registry import register

__all__ = ["RouterZ"]


@register("router_z")
class RouterZ(Loss):
    """Mean over the real tokens of ``logsumexp(logits) ** 2``, which keeps the router's softmax away from saturation.

    `layers`: "mean" over the sparse layers, or "sum". `stacks`: sparse layers of each stack of the model, encoder
    first, such as [6, 6]: each has a term of its own, and these are added (Hugging Face's Switch); null: all layers
    together. The weight of 0.001 is the paper's.

    Raises:
        ValueError: a negative or non-finite weight, another word for `layers`, a negative stack; when called, stacks
            that are not those of the model.

    Source: arXiv 2202.08906 (ST-MoE), equation 5.
    """

    def __init__(
        self, weight: float = 0.001, *, layers: Literal["mean", "sum"] = "mean", stacks: list[int] | None = None
    ) -> None:
        super().__init__(weight)
        self.layers = one_of("layers", layers, ("mean", "sum"))
        self.stacks = check_stacks(stacks)

    def __call__(self, routings: Sequence[Routing]) -> Float[Tensor, ""]:
        if self.stacks is None:
            return self._together(routings)
        return over_layers([self._together(stack) for stack in by_stack(routings, self.stacks)], "sum")

    def _together(self, routings: Sequence[Routing]) -> Float[Tensor, ""]:
        return over_layers([mean_square_logsumexp(r) for r in routings], self.layers)
