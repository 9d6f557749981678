"""Loads of neighbouring experts filled up to the same number, so that their products are one."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

__all__ = ["MOST", "evened", "filling", "shifts"]

MOST = ((96, 1.3), (768, 1.15))
"""Rows after filling up over rows before, up to which it pays where an expert has fewer rows than so in the mean.

Measured on two cores, forward and backward; larger products are shared by the threads as well as they are.
"""

COST = (35, 10)
"""What one batched product costs beside its rows, in rows: of one expert per thread, of several per thread.

Measured on two cores over loads of 64 to 512 rows. With one expert each, the threads wait for the slower one.
"""

LONGEST = 4
"""Experts per thread in one batched product, at most: with more it is no faster a row."""


def evened(sizes: tuple[int, ...], threads: int) -> tuple[int, ...] | None:
    """What to fill the loads up to; None: to nothing, as that would cost more than it saves.

    In a batched product of experts of equal loads each thread keeps to its own experts; one after the other, the
    threads share each product, which for a few hundred rows takes up to half as long again. Where one such product
    ends and the next begins is chosen so that rows and products together cost least.
    """
    if threads == 1 or len(sizes) == 1 or sum(sizes) < 2:
        return None
    total = sum(sizes)
    most = total * next((most for rows, most in MOST if total < rows * len(sizes)), 1.0)
    # Blocks of an expert per thread, the last one with those that are too few for another.
    bounds = [*range(0, max(len(sizes) - threads, 0) + 1, threads), len(sizes)]
    rows = [max(sizes[start:stop]) for start, stop in pairwise(bounds)]
    if sum((stop - start) * high for start, stop, high in zip(bounds, bounds[1:], rows, strict=False)) > most:
        return None
    filled: list[int] = []
    for first, end in pairwise(_cheapest(bounds, rows)):
        filled += [max(rows[first:end])] * (bounds[end] - bounds[first])
    return tuple(filled) if total < sum(filled) <= most else None


def _cheapest(bounds: list[int], rows: list[int]) -> list[int]:
    """The first block of each product, and the number of blocks: neighbours taken together at the least cost.

    The best way to divide the blocks before each end is known when the next end is reached.
    """
    cost: list[float] = [0]
    start = [0]
    for end in range(1, len(bounds)):
        least, best, high = math.inf, 0, 0
        for first in range(end - 1, max(end - 1 - LONGEST, -1), -1):
            high = max(high, rows[first])
            here = cost[first] + high * (bounds[end] - bounds[first]) + COST[end - first > 1]
            if here < least:
                least, best = here, first
        cost.append(least)
        start.append(best)
    way = [len(rows)]
    while way[-1]:
        way.append(start[way[-1]])
    return way[::-1]


def shifts(sizes: tuple[int, ...], filled: tuple[int, ...]) -> list[int]:
    """By how many rows each expert starts later than without the filling."""
    starts = zip(accumulate(filled[:-1], initial=0), accumulate(sizes[:-1], initial=0), strict=True)
    return [new - old for new, old in starts]


def filling(sizes: tuple[int, ...], filled: tuple[int, ...]) -> list[int]:
    """The rows between the load of each expert and what it was filled up to."""
    ends = zip(accumulate(filled), sizes, filled, strict=True)
    return [row for end, old, new in ends for row in range(end - new + old, end)]
