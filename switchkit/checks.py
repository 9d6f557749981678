"""What constructors refuse, in one form of words: the option, what it accepts, what it got."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral
from typing import TypeVar

__all__ = ["at_least", "finite_above", "from_0_below_1", "one_of", "whole"]

Word = TypeVar("Word", bound="str | None")


def one_of(name: str, value: Word, accepted: Iterable[str | None]) -> Word:
    """`value`, or a ValueError that says which words the option `name` accepts."""
    known = tuple(accepted)
    if value not in known:
        *most, last = ("null" if word is None else repr(word) for word in known)
        raise ValueError(f"{name} must be {', '.join(most)} or {last}; got {value!r}")
    return value


def whole(name: str, value: object) -> None:
    """A ValueError where `value` is no integer: torch would refuse it in the first step, or not at all."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be an integer; got {value!r}")


def at_least(least: int, **values: float) -> None:
    """A ValueError that names the first of the options below `least`."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")


def finite_above(bound: float, **values: float) -> None:
    """A ValueError that names the first of the options that is not finite or not above `bound`."""
    for name, value in values.items():
        if not bound < value < math.inf:
            raise ValueError(f"{name} must be a finite number > {bound}; got {value}")


def from_0_below_1(**values: float) -> None:
    """A ValueError that names the first of the options outside [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1); got {value}")
