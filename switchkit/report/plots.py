"""Curves as PNG files. Matplotlib is needed here alone: ``pip install 'switchkit[plot]'``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from switchkit.files import appearing

__all__ = ["can_plot", "plot_curves"]

Curve = tuple[Sequence[float], Sequence[float]]


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def plot_curves(
    path: Path, curves: Mapping[str, Sequence[Curve]], *, x: str, y: str, title: str, mark: float | None = None
) -> None:
    """Draw named groups of curves, one for each seed, a colour for each group, their mean where their x agree.

    Args:
        path: of the PNG.
        curves: name -> (x values, y values) of each seed.
        x: what the horizontal axis shows.
        y: what the vertical axis shows.
        title: above the picture.
        mark: a dashed horizontal line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot, which would look for a screen and keep figures.
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    every: list[float] = []
    ends: list[float] = [] if mark is None else [mark]
    for number, (name, seeds) in enumerate(curves.items()):
        colour = f"C{number % 10}"
        style = ("-", "--", ":")[number // 10 % 3]
        alike = len({tuple(xs) for xs, _ in seeds}) == 1 and len(seeds) > 1
        for index, (xs, ys) in enumerate(seeds):
            every += ys
            ends += ys[-1:]
            label = None if alike or index else name
            dot = "." if len(xs) == 1 else None  # a line of one point is none
            axes.plot(xs, ys, style, color=colour, label=label, alpha=0.25 if alike else 1, linewidth=1, marker=dot)
        if alike:
            mean = [sum(values) / len(values) for values in zip(*(ys for _, ys in seeds), strict=True)]
            axes.plot(seeds[0][0], mean, style, color=colour, label=name, marker="." if len(mean) == 1 else None)
    if mark is not None:
        axes.axhline(mark, linestyle="--", linewidth=1, color="grey")
    finite = sorted(filter(math.isfinite, every))
    if finite:
        # The first points, of a model that has learned nothing, would press all the others together.
        high = max(finite[int(0.95 * (len(finite) - 1))], *filter(math.isfinite, ends))
        room = 0.05 * max(high - finite[0], 1e-6)
        axes.set_ylim(finite[0] - room, high + room)
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title.replace("$", r"\$"), fontsize="medium", wrap=True)  # which would begin a formula
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with appearing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
