"""Metrics of language models and of routing: sums as state, ratios last, so that batches and ranks add up."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from switchkit import stats
from switchkit.records import Routing

__all__ = ["RoutingMetrics", "TokenLoss", "cross_entropy", "step_stats"]


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


def cross_entropy(
    logits: Float[Tensor, "B S V"], targets: Int[Tensor, "B S"], valid: Tensor | None
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Sum over the real targets, in float32, and their number."""
    if valid is not None:
        targets = targets.masked_fill(~valid, -100)
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")
    return total, (targets != -100).sum()


def step_stats(routings: tuple[Routing, ...], loss: Tensor | None = None) -> dict[str, Tensor]:
    """What callbacks get of a step: `load` [L, E], `dropped` [L] and `bad_tokens` [L], detached."""
    if not routings:
        empty = torch.zeros(0, dtype=torch.long, device=None if loss is None else loss.device)
        return {"load": empty.view(0, 0), "dropped": empty, "bad_tokens": empty}
    with torch.no_grad():
        return {
            "load": _stack([stats.load(r) for r in routings]),
            "dropped": torch.stack([stats.dropped(r) for r in routings]),
            "bad_tokens": torch.stack([stats.bad_tokens(r) for r in routings]),
        }


def _stack(loads: list[Tensor]) -> Tensor:
    """[L, E], filled up with zeros where layers have fewer experts."""
    width = max(len(load) for load in loads)
    return torch.stack([F.pad(load, (0, width - len(load))) for load in loads])
