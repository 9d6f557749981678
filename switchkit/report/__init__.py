"""Tables about models and runs."""

from switchkit.counts import Counts, count
from switchkit.report.run import checkpoint_line, closing, context_of, cut_short, describe, opening, part_of, predicted

__all__ = [
    "Counts",
    "checkpoint_line",
    "closing",
    "context_of",
    "count",
    "cut_short",
    "describe",
    "opening",
    "part_of",
    "predicted",
]
