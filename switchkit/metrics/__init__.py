"""Metrics of language models and of routing: sums as state, ratios last, so that batches and ranks add up."""

from switchkit.metrics.evaluation import Evaluation
from switchkit.metrics.language import TokenAccuracy, TokenLoss, count_targets, cross_entropy
from switchkit.metrics.routing import (
    DroppedByPosition,
    RoutingAgreement,
    RoutingInformation,
    RoutingMetrics,
    step_stats,
)

__all__ = [
    "DroppedByPosition",
    "Evaluation",
    "RoutingAgreement",
    "RoutingInformation",
    "RoutingMetrics",
    "TokenAccuracy",
    "TokenLoss",
    "count_targets",
    "cross_entropy",
    "step_stats",
]
