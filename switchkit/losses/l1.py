"""The loss that keeps a ReLU router sparse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from switchkit.checks import one_of
from switchkit.losses.base import Loss, over_layers
from switchkit.records import Routing, count_choices, count_tokens, sum_weights, target_k
from switchkit.registry import register

__all__ = ["L1", "l1"]


def l1(routing: Routing, *, refined: bool = True) -> Float[Tensor, ""]:
    """``sum_e f_e mean_t w_te`` of one layer: f_e = E / (k T) times the active tokens of e, or 1 if not `refined`."""
    tokens = count_tokens(routing).clamp(min=1).squeeze(0)
    mean = sum_weights(routing) / tokens
    if refined:
        active = count_choices(routing).squeeze(0).to(mean.dtype)
        mean = mean * (active * len(active) / (target_k(routing) * tokens))
    return mean.sum()


@register("l1")
class L1(Loss):
    """Mean over the tokens of the sum of their weights, each expert's by its load: for the router `relu`.

    ``1/T sum_t sum_e f_e w_te`` with ``f_e = E / (k T) * (tokens for which e is active)`` and no gradient through f; k
    is the number of active experts that the router aims at. Weights of ReLU may shrink to nothing, so the weight of
    this term must follow the sparsity: it starts at the paper's 1e-8 and a callback multiplies or divides it by 1.2
    after each step. For routers whose weights sum to one it is constant without `refined`, and a balance loss with it.

    Args:
        weight: the factor of this term in the loss, to begin with.
        refined: with the load f, which the paper found to keep all experts alive; without it f is 1.
        layers: "mean" over the sparse layers (the paper), or "sum".

    Raises:
        ValueError: a negative or non-finite weight, another word for `layers`.

    Source: arXiv 2412.14711 (ReMoE), sections 3.3 and 3.4.
    """

    def __init__(self, weight: float = 1e-8, *, refined: bool = True, layers: Literal["mean", "sum"] = "mean") -> None:
        super().__init__(weight)
        self.refined, self.layers = refined, one_of("layers", layers, ("mean", "sum"))

    def __call__(self, routings: Sequence[Routing]) -> Float[Tensor, ""]:
        return over_layers([l1(r, refined=self.refined) for r in routings], self.layers)
