"""What a routing record says about itself: pure functions, differentiable where that makes sense."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from switchkit.records import Routing, load

__all__ = ["bad_tokens", "dropped", "imbalance", "load"]


def dropped(routing: Routing) -> Int[Tensor, ""]:
    """Chosen assignments that did not fit."""
    if routing.kept is None:
        raise ValueError("this routing was not placed yet: call capacity.place(routing, limit) first")
    return routing.chosen.sum() - routing.kept.sum()


def imbalance(routing: Routing) -> Float[Tensor, ""]:
    """Largest load over mean load: 1 when even, E when one expert gets everything, 0 when nothing was chosen."""
    counts = load(routing)
    return counts.max() * len(counts) / counts.sum().clamp(min=1)


def bad_tokens(routing: Routing) -> Int[Tensor, ""]:
    """Real tokens for which the router saw NaN or infinity."""
    return (~torch.isfinite(routing.logits).all(-1) & routing.valid).sum()
