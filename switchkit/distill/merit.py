"""How much of what a mixture gains over its dense twin a distilled student keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

__all__ = ["Preserved", "percent_preserved"]


@dataclass(frozen=True)
class Preserved:
    """The percentage, or why there is none."""

    percent: float | None
    """Of the teacher's gain that the student keeps; null: see `reason`."""
    spread: float | None
    """Standard error of the percentage, in percent; null where a seed each says nothing of it."""
    gain: float
    """Of the teacher over the dense model, in the unit of the figures, positive where the teacher is better."""
    noise: float | None
    """Two standard errors of the gain; null where a seed each says nothing of it."""
    reason: str | None = None
    """Why the percentage was refused, or what it cannot say."""


def percent_preserved(
    student: float | Sequence[float],
    dense: float | Sequence[float],
    teacher: float | Sequence[float],
    *,
    lower: bool = True,
) -> Preserved:
    """``100 (student - dense) / (teacher - dense)`` of mean figures on the same held-out text, a figure for each seed.

    Refused where the teacher's gain is no gain, or within two standard errors of it. The spread is that of the ratio by
    its first-order expansion, with the seeds of the three independent.

    Args:
        student: loss of each seed of the student.
        dense: of the dense model of the student's shape, trained as long.
        teacher: of the teacher.
        lower: a lower figure is better, as of losses; false: a higher one, as of accuracies.

    Raises:
        ValueError: no figure for one of them, or one that is not finite.

    Source: arXiv 2101.03961, section 4.2.
    """
    found = {"student": _listed(student), "dense": _listed(dense), "teacher": _listed(teacher)}
    for name, values in found.items():
        if not values or not all(map(math.isfinite, values)):
            raise ValueError(f"{name} needs one finite figure or more; got {list(values)}")
    s, d, t = (fmean(found[name]) for name in ("student", "dense", "teacher"))
    errors = {name: _squared_error(values) for name, values in found.items()}
    gain = d - t if lower else t - d
    both = errors["dense"], errors["teacher"]
    noise = None if None in both else 2 * math.sqrt(sum(filter(None, both)))
    if gain <= 0:
        return Preserved(None, None, gain, noise, f"the teacher is no better than the dense model (by {gain:.4g})")
    if noise is not None and gain <= noise:
        why = f"the teacher's gain of {gain:.4g} is within the noise of its seeds ({noise:.4g}, two standard errors)"
        return Preserved(None, None, gain, noise, why)
    ratio = (d - s) / (d - t)
    spread = None
    if noise is not None and errors["student"] is not None:
        # Of (d - s) / (d - t): the dense model stands in both.
        parts = errors["student"] + (1 - ratio) ** 2 * (both[0] or 0) + ratio**2 * (both[1] or 0)
        spread = 100 * math.sqrt(parts) / gain
    few = [name for name, value in errors.items() if value is None]
    told = f"one seed of {', '.join(few)}: the noise is not known" if few else None
    return Preserved(100 * ratio, spread, gain, noise, told)


def _listed(values: float | Sequence[float]) -> list[float]:
    return [float(value) for value in values] if isinstance(values, Sequence) else [float(values)]


def _squared_error(values: Sequence[float]) -> float | None:
    """Of the mean; null of one value."""
    return variance(values) / len(values) if len(values) > 1 else None
