"""What a validation or a test measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from switchkit.metrics.language import TokenAccuracy, TokenLoss, cross_entropy
from switchkit.metrics.routing import RoutingMetrics, step_stats
from switchkit.models import Output

__all__ = ["Evaluation"]


class Evaluation(nn.Module):
    """Loss, accuracy and routing over all batches and ranks since the last reset.

    Args:
        num_experts: experts of each sparse layer.
    """

    def __init__(self, num_experts: Sequence[int]) -> None:
        super().__init__()
        self.loss = TokenLoss()
        self.accuracy = TokenAccuracy()
        self.routing = RoutingMetrics(len(num_experts), num_experts, scores=True)

    def update(self, out: Output, batch: Mapping[str, Tensor]) -> None:
        """Add a batch, with its `targets` [B, S] and perhaps `valid` [B, S], and what the model made of it."""
        self.loss.update(*cross_entropy(out.logits, batch["targets"], batch.get("valid")))
        self.accuracy.update(out.logits, batch["targets"], batch.get("valid"))
        self.routing.update(step_stats(out.routings, out.logits, scores=True))

    def compute(self) -> dict[str, Tensor]:
        """One number each: `loss`, `bits`, `perplexity` and `accuracy`, and with sparse layers `imbalance` (that of the
        worst layer), `dropped`, `router_entropy`, `router_confidence` (means over layers) and `dead_experts` (of all).
        """
        found = {**self.loss.compute(), "accuracy": self.accuracy.compute()}
        if self.routing.num_experts:
            routing = self.routing.compute()
            found["imbalance"] = routing["imbalance"].max()
            found["dropped"] = routing["dropped"].mean()
            found["dead_experts"] = routing["dead"].sum()
            found["router_entropy"] = routing["entropy"].mean()
            found["router_confidence"] = routing["confidence"].mean()
        return {name: value.float() for name, value in found.items()}

    def reset(self) -> None:
        """Begin anew."""
        self.loss.reset()
        self.accuracy.reset()
        self.routing.reset()
