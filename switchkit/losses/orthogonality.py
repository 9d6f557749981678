"""The loss that keeps the router's rows apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from switchkit.checks import one_of
from switchkit.kernels.precision import full_precision
from switchkit.losses.base import Loss, over_layers
from switchkit.records import Routing, count_tokens
from switchkit.registry import register

__all__ = ["Orthogonality", "orthogonality"]


def _router_rows(routing: Routing) -> Float[Tensor, "E D"]:
    """The router's weights, one row for each expert, in float32 or better: `extras["rows"]`.

    Raises:
        ValueError: a router that has no such rows, or does not hand them over.
    """
    if "rows" not in routing.extras:
        raise ValueError(
            "the orthogonality loss needs extras 'rows' [E, D], which routers with one linear map provide (switch, "
            f"top_k, ...); got extras {sorted(routing.extras)}: use such a router, or return "
            "token_choice(..., extras=self.extras()) from your own LinearRouter"
        )
    rows = routing.extras["rows"]
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def orthogonality(routing: Routing) -> Float[Tensor, ""]:
    """Mean squared cosine between the rows of two different experts; zero for one expert or without a real token."""
    rows = _router_rows(routing)
    # The training step may run under autocast, where the product would be rounded to half precision.
    with full_precision(rows.device):
        rows = F.normalize(rows, dim=-1)
        cosine = rows @ rows.mT
    experts = len(rows)
    same = torch.eye(experts, dtype=torch.bool, device=rows.device)
    mean = cosine.masked_fill(same, 0).square().sum() / max(experts * (experts - 1), 1)
    return mean.masked_fill((count_tokens(routing) == 0).squeeze(0), 0)


@register("orthogonality")
class Orthogonality(Loss):
    """Mean squared cosine between the router's rows of two different experts, for routers with one linear map.

    The mean of the entries of ``W W^T - I`` off the diagonal, squared, with the rows of W normalised: 0 when
    orthogonal, 1 when all rows are parallel. Experts then answer to different directions of a token. `layers`: "mean"
    over the sparse layers, or "sum". The weight of 0.01 is the default of the source's code.

    Elsewhere: ERNIE 4.5's code divides by E^2, so that its value is (E - 1)/E of this one, and may apply the gradient
    as an update of its own after the optimizer's step, in the manner of weight decay. "Advancing Expert Specialization"
    (arXiv 2505.22323) makes the outputs of the experts orthogonal, not the rows of the router.

    Raises:
        ValueError: a negative or non-finite weight, another word for `layers`; when called, a router that does not
            provide its rows.

    Source: the router orthogonalization loss of ERNIE 4.5, https://github.com/PaddlePaddle/ERNIE
    """

    def __init__(self, weight: float = 0.01, *, layers: Literal["mean", "sum"] = "mean") -> None:
        super().__init__(weight)
        self.layers = one_of("layers", layers, ("mean", "sum"))

    def __call__(self, routings: Sequence[Routing]) -> Float[Tensor, ""]:
        return over_layers([orthogonality(r) for r in routings], self.layers)
