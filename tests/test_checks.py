"""What an option is refused for, and in which words."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from switchkit.checks import at_least, finite_above, from_0_below_1, one_of, whole


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        (lambda: one_of("x", "d", ("a", "b", "c")), "x must be 'a', 'b' or 'c'; got 'd'"),
        (lambda: one_of("x", "d", ("a", "b", None)), "x must be 'a', 'b' or null; got 'd'"),
        (lambda: one_of("x", None, {"a": 1, "b": 2}), "x must be 'a' or 'b'; got None"),
        (lambda: one_of("x", ["a"], {"a": 1, "b": 2}), "x must be 'a' or 'b'; got ['a']"),
        (lambda: whole("x", 2.0), "x must be an integer; got 2.0"),
        (lambda: whole("x", True), "x must be an integer; got True"),
        (lambda: at_least(1, x=1, y=0, z=-1), "y must be at least 1; got 0"),
        (lambda: at_least(0, x=-1), "x must be at least 0; got -1"),
        (lambda: finite_above(0, x=0.1, y=0.0), "y must be a finite number > 0; got 0.0"),
        (lambda: finite_above(0.01, x=0.01), "x must be a finite number > 0.01; got 0.01"),
        (lambda: finite_above(0, x=float("inf")), "x must be a finite number > 0; got inf"),
        (lambda: finite_above(0, x=float("nan")), "x must be a finite number > 0; got nan"),
        (lambda: from_0_below_1(x=0.9, y=1.0), "y must be in [0, 1); got 1.0"),
        (lambda: from_0_below_1(x=-0.1), "x must be in [0, 1); got -0.1"),
        (lambda: from_0_below_1(x=float("nan")), "x must be in [0, 1); got nan"),
    ],
)
def test_what_is_refused(refused: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        refused()


def test_what_is_taken() -> None:
    assert one_of("x", "b", ("a", "b")) == "b"
    assert one_of("x", None, ("a", None)) is None
    whole("x", -3)
    at_least(1, x=1, y=2)
    finite_above(0, x=1e-300, y=1e300)
    from_0_below_1(x=0, y=0.999)
