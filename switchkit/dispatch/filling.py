"""Loads of neighbouring experts filled up to the same number, so that their products are one."""

from __future__ import annotations

from itertools import accumulate

__all__ = ["MOST", "evened", "filling", "shifts"]

MOST = ((96, 1.3), (768, 1.15))
"""Rows after filling up over rows before, up to which it pays where an expert has fewer rows than so in the mean.

Measured on two cores, forward and backward; larger products are shared by the threads as well as they are.
"""


def evened(sizes: tuple[int, ...], threads: int) -> tuple[int, ...] | None:
    """What to fill the loads up to; None: to nothing, as that would cost more than it saves.

    A batched product of two experts per thread lets each thread keep to its own experts; one after the other, the
    threads share each product, which for a few hundred rows takes up to half as long again.
    """
    if threads == 1 or len(sizes) == 1 or sum(sizes) < 2:
        return None
    together, total = 2 * threads, sum(sizes)
    runs = [sizes[first : first + together] for first in range(0, len(sizes), together)]
    filled = tuple(max(run) for run in runs for _ in run)
    most = next((most for rows, most in MOST if total < rows * len(sizes)), 1.0)
    return filled if total < sum(filled) <= most * total else None


def shifts(sizes: tuple[int, ...], filled: tuple[int, ...]) -> list[int]:
    """By how many rows each expert starts later than without the filling."""
    starts = zip(accumulate(filled[:-1], initial=0), accumulate(sizes[:-1], initial=0), strict=True)
    return [new - old for new, old in starts]


def filling(sizes: tuple[int, ...], filled: tuple[int, ...]) -> list[int]:
    """The rows between the load of each expert and what it was filled up to."""
    ends = zip(accumulate(filled), sizes, filled, strict=True)
    return [row for end, old, new in ends for row in range(end - new + old, end)]
