"""The files that a comparison leaves: tables as CSV and Markdown, curves as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from switchkit.compare.arithmetic import Spread
from switchkit.compare.folder import Result
from switchkit.compare.summary import Row, pairs_of, rows_of, sentence, speed_ups
from switchkit.files import write_text

__all__ = ["COLUMNS", "cells", "write_tables"]

COLUMNS = (
    "run",
    "held-out loss",
    "parameters",
    "active",
    "FLOPs/token",
    "steps",
    "tokens/s",
    "faster in steps",
    "faster in time",
    "dropped",
    "imbalance",
)
_CURVE = ("step", "tokens", "flops", "seconds", "train_loss", "held_out_loss")


def cells(row: Row) -> list[str]:
    """A row of the table, as text."""
    failed = f", {row.failed} failed" if row.failed else ""
    return [
        row.run,
        (_number(row.loss, ".4f") if row.loss else "-") + failed,
        f"{row.one.parameters:,}",
        f"{row.one.active_parameters:,}",
        f"{row.one.flops_per_token:,}",
        f"{row.steps.mean:,.0f}" if row.steps else "-",
        f"{row.speed.mean:,.0f}" if row.speed else "-",
        _faster(row.faster_steps, row.compared),
        _faster(row.faster_time, row.compared),
        f"{row.dropped.mean:.2%}" if row.dropped else "-",
        _number(row.imbalance, ".2f") if row.imbalance else "-",
    ]


def write_tables(folder: Path, results: Sequence[Result], twin: str, title: str, notes: Sequence[str]) -> None:
    """``runs.csv``, ``curves.csv``, ``differences.csv`` and ``README.md`` of the results so far."""
    fast = speed_ups(results, twin)
    runs, curves = [], []
    for result in results:
        told = asdict(result)
        points = told.pop("points")
        own = fast.get((result.run, result.seed))
        told |= {
            "tokens_per_second": result.tokens / result.seconds if result.seconds else None,
            "curve_loss": points[-1]["held_out_loss"] if points else None,
            "target_loss": own.target if own else None,
            "faster_in_steps": own.steps if own else None,
            "faster_in_time": own.seconds if own else None,
        }
        runs.append(told)
        per_token = result.train_flops / result.tokens if result.tokens else 0
        for point in points:
            flops = per_token * point["tokens"]
            curves.append(
                {"run": result.run, "seed": result.seed, **{k: (point | {"flops": flops})[k] for k in _CURVE}}
            )
    pairs = pairs_of(results)
    apart = [
        {
            "lower": pair.first,
            "higher": pair.second,
            "seeds": pair.difference.count,
            "difference": pair.difference.mean,
            "half_width": pair.difference.half_width,
            "exceeds_spread": pair.difference.exceeds,
        }
        for pair in pairs
    ]
    _csv(folder / "runs.csv", runs)
    _csv(folder / "curves.csv", curves, ("run", "seed", *_CURVE))
    _csv(folder / "differences.csv", apart, ("lower", "higher", "seeds", "difference", "half_width", "exceeds_spread"))
    rows = rows_of(results, twin)
    lines = [f"# {title}", "", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    lines += ["", sentence(pairs, twin), ""]
    lines += [f"- {note}" for note in notes]
    failed = [result for result in results if not result.finished]
    lines += [
        f"- {result.run}, seed {result.seed}, failed after {result.steps} steps: {result.reason}" for result in failed
    ]
    pictures = sorted(folder.glob("loss_by_*.png"))
    lines += ["", *(f"![{path.stem}]({path.name})" for path in pictures)]
    write_text(folder / "README.md", "\n".join(lines).rstrip() + "\n")


def _number(found: Spread, form: str) -> str:
    tail = "" if found.deviation is None else f" ± {found.deviation:{form}}"
    return f"{found.mean:{form}}{tail}"


def _faster(found: Spread | None, compared: int) -> str:
    if not compared:
        return "-"
    if found is None:
        return "not reached"
    some = "" if found.count == compared else f" ({found.count} of {compared} seeds)"
    return f"{found.mean:.2f}{some}"


def _csv(path: Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or (list(rows[0]) if rows else []), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
