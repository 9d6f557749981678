"""Metrics of language models and of routing: sums as state, ratios last, so that batches and ranks add up."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

__all__ = ["RoutingMetrics", "TokenLoss"]


class RoutingMetrics(Metric):
    """Load and drops per sparse layer, over all batches and ranks since the last reset.

    Update it with a module's `stats`. Computes ``{"load": [L, E], "imbalance": [L], "dropped": [L]}``: load as a share
    of the layer's assignments, imbalance as largest over mean load, dropped as a share of the chosen assignments.

    Args:
        num_layers: sparse layers.
        num_experts: experts of each.
    """

    full_state_update = False
    load: Tensor
    dropped: Tensor

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.add_state("load", torch.zeros(num_layers, num_experts, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("dropped", torch.zeros(num_layers, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, stats: Mapping[str, Tensor]) -> None:
        self.load += stats["load"]
        self.dropped += stats["dropped"]

    def compute(self) -> dict[str, Tensor]:
        total = self.load.sum(-1)
        share = self.load / total.clamp(min=1).unsqueeze(-1)
        return {
            "load": share,
            "imbalance": share.amax(-1) * self.num_experts if self.load.numel() else total,
            "dropped": self.dropped / total.clamp(min=1),
        }


class TokenLoss(Metric):
    """Mean cross-entropy per real token, in nats, weighted by tokens and not by batches."""

    full_state_update = False
    total: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, total: Float[Tensor, ""], tokens: int | Tensor) -> None:
        self.total += total
        self.tokens += tokens

    def compute(self) -> dict[str, Tensor]:
        loss = self.total / self.tokens.clamp(min=1)
        return {"loss": loss, "bits": loss / math.log(2), "perplexity": loss.exp()}
