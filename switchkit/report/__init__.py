"""Tables about models and runs."""

from switchkit.report.counts import Counts, count
from switchkit.report.run import closing, describe, opening

__all__ = ["Counts", "closing", "count", "describe", "opening"]
