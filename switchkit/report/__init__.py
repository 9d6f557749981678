"""Tables about models and runs."""

from switchkit.counts import Counts, count
from switchkit.report.run import checkpoint_line, closing, describe, opening, predicted

__all__ = ["Counts", "checkpoint_line", "closing", "count", "describe", "opening", "predicted"]
