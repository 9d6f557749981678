"""The table of a mixture's students."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from switchkit.distill.table import TableRow
from switchkit.report.numbers import three_digits, with_unit
from switchkit.report.tables import figures

__all__ = ["distill_table"]


def distill_table(rows: Sequence[TableRow], about: str) -> Table:
    """Losses, what of the gain is kept, and what it costs; `about` says on what text."""
    peak = any(row.peak is not None for row in rows)
    names = ("model", "seeds", "nats per\ntoken", "gain\nkept", "para-\nmeters", "smaller", "tokens\n/s", "weights")
    table = figures(f"Distillation: {about}", [*names, *(["peak\nmemory"] if peak else [])])
    for row in rows:
        cells = [
            row.name,
            str(len(row.losses)),
            f"{row.loss:.4f}" + ("" if row.spread is None else f" ± {row.spread:.4f}"),
            _kept(row),
            with_unit(row.parameters),
            f"{row.compression:.1%}",
            f"{row.tokens_per_second:,.0f}",
            _bytes(row.weights),
        ]
        table.add_row(*cells, *([_bytes(row.peak or 0)] if peak else []))
    return table


def _kept(row: TableRow) -> str:
    if row.preserved is None:
        return ""
    if row.preserved.percent is None:
        return "refused"
    spread = row.preserved.spread
    return f"{row.preserved.percent:.0f}%" + ("" if spread is None else f" ± {spread:.0f}")


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{three_digits(size)} {unit}"
        size /= 1024
    return f"{three_digits(size)} GiB"
