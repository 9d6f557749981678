"""Metrics of language models: means over real tokens, whatever the batches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from switchkit.metrics.sums import Sums

__all__ = ["TokenAccuracy", "TokenLoss", "count_targets", "cross_entropy"]


class TokenLoss(Sums):
    """Mean cross-entropy per real token, in nats, weighted by tokens and not by batches."""

    total: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("total", dtype=torch.float64)
        self.add_sum("tokens", dtype=torch.float64)

    def update(self, total: Float[Tensor, ""], tokens: int | Tensor) -> None:
        self.total += total
        self.tokens += tokens

    def compute(self) -> dict[str, Tensor]:
        loss = self.total / self.tokens.clamp(min=1)
        return {"loss": loss, "bits": loss / math.log(2), "perplexity": loss.exp()}


class TokenAccuracy(Sums):
    """Share of the real targets that are the likeliest token."""

    correct: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("correct", "tokens"):
            self.add_sum(name)

    def update(
        self, logits: Float[Tensor, "B S V"], targets: Int[Tensor, "B S"], valid: Bool[Tensor, "B S"] | None = None
    ) -> None:
        """Add a batch; `valid`: True for real targets. Targets of -100 do not count either, as in the loss."""
        real = targets != -100 if valid is None else valid & (targets != -100)
        self.correct += ((logits.argmax(-1) == targets) & real).sum()
        self.tokens += real.sum()

    def compute(self) -> Float[Tensor, ""]:
        return self.correct / self.tokens.clamp(min=1)


def cross_entropy(
    logits: Float[Tensor, "B S V"], targets: Int[Tensor, "B S"], valid: Tensor | None
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Sum over the real targets, in float32, and their number."""
    if valid is not None:
        targets = targets.masked_fill(~valid, -100)
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")
    return total, (targets != -100).sum()


def count_targets(targets: Int[Tensor, "B S"], valid: Tensor | None) -> Int[Tensor, ""]:
    """Real targets: those that `cross_entropy` is summed over."""
    real = targets != -100
    return (real if valid is None else real & valid).sum()
