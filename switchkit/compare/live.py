"""What is shown while a comparison trains."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live

from switchkit.compare.folder import Result
from switchkit.compare.recorder import Show
from switchkit.report.tables import figures

__all__ = ["Board"]


class Board:
    """A table of all runs that follows the training; where the output is no terminal, a line as each run ends.

    Args:
        console: where it is shown.
        runs: name, seed and planned steps, in their order.
        results: of those that ended before.
    """

    def __init__(self, console: Console, runs: Sequence[tuple[str, int, int]], results: Sequence[Result]) -> None:
        self._console, self._total = console, len(runs)
        self._rows = {(name, seed): ["", f"0/{steps:,}", "", "", ""] for name, seed, steps in runs}
        self._steps = {(name, seed): steps for name, seed, steps in runs}
        self._live = Live(console=console, auto_refresh=False) if console.is_interactive else None
        self._ended = 0
        for result in results:
            self._put(result)

    def __enter__(self) -> Board:
        if self._live is not None:
            self._live.start()
            self._refresh()
        elif self._ended:
            self._console.print(f"{self._ended} of {self._total} runs are finished already", highlight=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, name: str, seed: int) -> Show:
        """What a `Recorder` of one run calls."""

        def show(step: int, loss: float, held_out: float | None, speed: float) -> None:
            row = self._rows[name, seed]
            row[:] = [
                "trains",
                f"{step:,}/{self._steps[name, seed]:,}",
                f"{loss:.4f}",
                "" if held_out is None else f"{held_out:.4f}",
                f"{speed:,.0f}",
            ]
            self._refresh()

        return show

    def ended(self, result: Result) -> None:
        """A run finished or failed."""
        self._put(result)
        self._refresh()
        if self._live is None:
            values = self._rows[result.run, result.seed]
            told = f"step {values[1]}  held-out {values[3]}  tokens/s {values[4]}  {result.seconds:.0f} s"
            failed = "" if result.finished else f"  FAILED: {result.reason}"
            self._console.print(
                f"[{self._ended}/{self._total}] {result.run}, seed {result.seed}  {told}{failed}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )

    def _put(self, result: Result) -> None:
        self._ended += 1
        row = self._rows[result.run, result.seed]
        loss = result.held_out_loss
        row[0] = result.status
        row[1] = f"{result.steps:,}/{self._steps[result.run, result.seed]:,}"
        row[2] = f"{result.points[-1]['train_loss']:.4f}" if result.points else ""
        row[3] = "" if loss is None else f"{loss:.4f}"
        row[4] = f"{result.tokens / result.seconds:,.0f}" if result.seconds else ""

    def _refresh(self) -> None:
        if self._live is None:
            return
        columns = ("run", "seed", "", "step", "loss", "held out", "tokens/s")
        table = figures(None, columns, frame=None, words=[""])
        for (name, seed), values in self._visible():
            style = "bold" if values[0] == "trains" else "red" if values[0] == "failed" else None
            table.add_row(name, str(seed), *values, style=style)
        table.caption = f"{self._ended} of {self._total} runs ended"
        self._live.update(table, refresh=True)

    def _visible(self) -> list[tuple[tuple[str, int], list[str]]]:
        """As many rows as the screen has, those around the run that trains."""
        rows = list(self._rows.items())
        room = max(5, self._console.size.height - 4)
        if len(rows) <= room:
            return rows
        begin = min(max(0, self._ended - room // 2), len(rows) - room)
        return rows[begin : begin + room]
