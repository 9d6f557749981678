"""Numbers as a person reads them."""

from __future__ import annotations

__all__ = ["three_digits", "with_unit"]


def three_digits(value: float, sign: str = "") -> str:
    """Three digits of a number, and all that stand before its point: 0.00123, 12.3, 1,234.

    `sign` "+" shows the sign of numbers above 0 too.
    """
    return f"{value:{sign},.0f}" if abs(value) >= 100 else f"{value:{sign}.3g}"


def with_unit(value: float) -> str:
    """A number with a unit, three digits of it."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{three_digits(value)}{unit}" if unit else f"{value:.0f}"
        value /= 1000
    return f"{three_digits(value)}P"
