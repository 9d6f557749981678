"""``switchkit describe``: the model that a recipe builds, without training it."""

from __future__ import annotations

from collections.abc import Sequence

from switchkit import report
from switchkit.cli.lightning import build

__all__ = ["run"]


def run(command: str, argv: Sequence[str]) -> int:
    """Print the table that opens a training run. Takes the options of ``switchkit fit``."""
    report.describe(build(argv))
    return 0
