"""The arithmetic of a comparison: budgets, when a curve reaches a loss, and which differences exceed the spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

__all__ = ["Difference", "Spread", "difference", "reached", "spread", "steps_within", "t_quantile"]


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (None: of one value) over seeds."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """The mean over seeds of ``first - second``, seed by seed, and half the width of its confidence interval."""

    mean: float
    half_width: float | None
    """None: one seed, which says nothing about the spread."""
    count: int

    @property
    def exceeds(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and spread of some values; None for no value."""
    if not values:
        return None
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def difference(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Difference | None:
    """The paired difference of two runs' losses, value i of both being of the same seed; None for no seed.

    The interval is Student's, ``t * s / sqrt(n)`` with n - 1 degrees of freedom, s the standard deviation of the n
    differences. Paired, since runs of one seed read the same data in the same order, and what that adds to both losses
    cancels.

    Raises:
        ValueError: unequal numbers of values.
    """
    found = spread([a - b for a, b in zip(first, second, strict=True)])
    if found is None:
        return None
    half = None
    if found.deviation is not None:
        half = t_quantile((1 + confidence) / 2, found.count - 1) * found.deviation / math.sqrt(found.count)
    return Difference(found.mean, half, found.count)


def t_quantile(share: float, freedom: int) -> float:
    """The `share` quantile, from 0.5 up, of Student's t with a whole number of degrees of freedom.

    By bisection of the finite series for its distribution (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    Raises:
        ValueError: freedom below 1, or a share outside [0.5, 1).
    """
    if freedom < 1 or not 0.5 <= share < 1:
        raise ValueError(f"freedom must be at least 1 and share in [0.5, 1); got {freedom} and {share}")
    low, high = 0.0, 1.0
    while _within(high, freedom) < 2 * share - 1:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 2 * share - 1 else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """Probability of ``-t < T < t``."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def reached(positions: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """Where a curve first comes down to `target`, on straight lines between its points; None: nowhere.

    A curve that begins at or below the target reached it by its first point, which is then the answer. Points whose
    loss is no finite number are left out.
    """
    points = [point for point in zip(positions, losses, strict=True) if math.isfinite(point[1])]
    for index, (position, loss) in enumerate(points):
        if loss <= target:
            if index == 0:
                return position
            last, before = points[index - 1]
            return last + (before - target) / (before - loss) * (position - last)
    return None


def steps_within(budget: int, cost: int) -> int:
    """Whole steps of a cost that fit into a budget."""
    return budget // cost
