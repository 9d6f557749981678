"""The rows of the paper's Table 6 for models of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from switchkit.distill.evaluation import Evaluated
from switchkit.distill.merit import Preserved, percent_preserved

__all__ = ["TableRow", "table_rows"]


@dataclass(frozen=True)
class TableRow:
    """One kind of model, a checkpoint for each seed."""

    name: str
    losses: tuple[float, ...]
    """Nats per held-out token, of each seed."""
    parameters: int
    compression: float
    """Share of the teacher's parameters that it does without."""
    tokens_per_second: float
    """Of the fastest seed."""
    weights: int
    """Bytes."""
    peak: int | None
    """Bytes on a CUDA device, weights and activations; null elsewhere."""
    preserved: Preserved | None
    """Of the teacher's gain; null for the dense model and the teacher themselves."""

    @property
    def loss(self) -> float:
        return fmean(self.losses)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; null of one."""
        return stdev(self.losses) if len(self.losses) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        kept = self.preserved
        return {
            "name": self.name,
            "seeds": len(self.losses),
            "loss": self.loss,
            "loss_spread": self.spread,
            "losses": list(self.losses),
            "parameters": self.parameters,
            "compression": self.compression,
            "tokens_per_second": self.tokens_per_second,
            "weight_bytes": self.weights,
            "peak_bytes": self.peak,
            "preserved_percent": None if kept is None else kept.percent,
            "preserved_spread": None if kept is None else kept.spread,
            "note": None if kept is None else kept.reason,
        }


def table_rows(
    dense: Sequence[Evaluated], teacher: Sequence[Evaluated], students: Mapping[str, Sequence[Evaluated]]
) -> list[TableRow]:
    """Dense model, teacher and students in order, each with the evaluations of its seeds.

    Raises:
        ValueError: none of one kind; seeds of one row with different numbers of parameters.

    Source: arXiv 2101.03961, Table 6.
    """
    base = [one.loss for one in dense]
    best = [one.loss for one in teacher]
    rows = [_row("dense", dense, teacher, None), _row("teacher", teacher, teacher, None)]
    for name, seeds in students.items():
        rows.append(_row(name, seeds, teacher, percent_preserved([one.loss for one in seeds], base, best)))
    return rows


def _row(name: str, seeds: Sequence[Evaluated], teacher: Sequence[Evaluated], preserved: Preserved | None) -> TableRow:
    if not seeds:
        raise ValueError(f"{name}: there is no checkpoint")
    sizes = sorted({one.parameters for one in seeds})
    if len(sizes) > 1:
        raise ValueError(
            f"{name}: the seeds of one row are models of one size, and these have {' and '.join(map(str, sizes))} "
            "parameters: give each its own name"
        )
    return TableRow(
        name=name,
        losses=tuple(one.loss for one in seeds),
        parameters=sizes[0],
        compression=1 - sizes[0] / teacher[0].parameters,
        tokens_per_second=max(one.tokens_per_second for one in seeds),
        weights=seeds[0].weights,
        peak=max((one.peak for one in seeds if one.peak is not None), default=None),
        preserved=preserved,
    )
