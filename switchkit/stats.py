"""What a routing record says about itself: pure functions, differentiable where that makes sense."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from switchkit.records import Routing, load

__all__ = ["dropped", "finite", "imbalance"]


def dropped(routing: Routing) -> Float[Tensor, ""]:
    """Share of the chosen assignments that did not fit; zero when there is none."""
    if routing.kept is None:
        raise ValueError("this routing was not placed yet: call capacity.place(routing, limit) first")
    made = routing.chosen.sum()
    return (made - routing.kept.sum()) / made.clamp(min=1)


def imbalance(routing: Routing) -> Float[Tensor, ""]:
    """Largest load over mean load: 1 when even, E when one expert gets everything, 0 when nothing was chosen."""
    counts = load(routing)
    return counts.max() * len(counts) / counts.sum().clamp(min=1)


def finite(routing: Routing) -> Bool[Tensor, ""]:
    """True: the router saw no NaN or infinity in a real token."""
    return torch.isfinite(routing.logits).all(-1).logical_or(~routing.valid).all()
