"""The curves of a comparison as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from switchkit.compare.folder import Result
from switchkit.report.plots import plot_curves

__all__ = ["write_pictures"]

_AXES = {
    "steps": ("step", 1.0, "steps"),
    "flops": ("tokens", 0.0, "training FLOPs"),
    "time": ("seconds", 1.0, "seconds"),
}


def write_pictures(folder: Path, results: Sequence[Result], twin: str, title: str) -> None:
    """``loss_by_steps.png``, ``loss_by_flops.png`` and ``loss_by_time.png``; a dashed line: the twin's last loss."""
    ends = [r.points[-1]["held_out_loss"] for r in results if r.run == twin and r.finished and r.points]
    for name, (key, scale, label) in _AXES.items():
        curves: dict[str, list[tuple[list[float], list[float]]]] = {}
        for result in results:
            if result.points:
                per = scale or result.train_flops / max(result.tokens, 1)
                xs = [per * point[key] for point in result.points]
                curves.setdefault(result.run, []).append((xs, [point["held_out_loss"] for point in result.points]))
        if curves:
            plot_curves(
                folder / f"loss_by_{name}.png",
                curves,
                x=label,
                y="held-out loss (nats per token)",
                title=title,
                mark=sum(ends) / len(ends) if ends else None,
            )
