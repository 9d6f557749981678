"""How a property says that it does not hold: in one sentence, whether Python runs with -O or not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["Broken", "breaks", "error", "expect", "same"]

F = TypeVar("F", bound=Callable[..., None])


class Broken(AssertionError):
    """A property does not hold. The message says what was expected, what was seen, and what it breaks in training."""


def expect(condition: object, message: str) -> None:
    """Raise `Broken` with this message unless the condition is true."""
    if not condition:
        raise Broken(message)


def error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; NaN is infinite, and zero must be met closely."""
    expect(got.shape == expected.shape, f"a shape of {list(got.shape)} where {list(expected.shape)} was expected")
    # What a property makes up itself lies on the CPU, wherever the layer is.
    got, expected = got.detach().double(), expected.detach().double().to(got.device)
    # Logits of -inf, of experts that are closed to a token: they meet, and have no difference.
    closed = (got == -torch.inf) & (expected == -torch.inf)
    got, expected = got.masked_fill(closed, 0), expected.masked_fill(closed, 0)
    found = float((got - expected).norm() / expected.norm().clamp(min=1e-3))
    return found if found == found else float("inf")


def same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, change: str = "differs:") -> None:
    """Raise `Broken` unless every tensor of one result equals that of the other by relative norm, and none is missing.

    `change` begins the sentence, before the names of what differs: "padding changed".
    """
    missing = sorted(got.keys() ^ expected.keys())
    expect(not missing, f"{change} {', '.join(missing)}, which only one of the two results has")
    errors = {name: error(got[name], expected[name]) for name in expected}
    wrong = {name: value for name, value in errors.items() if not value <= tolerance}
    if wrong:
        worst = max(wrong.values())
        names = ", ".join(list(wrong)[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise Broken(f"{change} {names} (relative error {worst:.2g}, at most {tolerance:g} expected)")


def breaks(consequence: str) -> Callable[[F], F]:
    """Make a function of a case a property: its `Broken` names the part first, and last what goes wrong in training."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def checked(case: Any, *args: Any, **options: Any) -> None:
            try:
                function(case, *args, **options)
            except Broken as broken:
                raise Broken(f"{_name_of(case)}: {broken}: {consequence}") from None

        return cast(F, checked)

    return decorate


def _name_of(case: Any) -> str:
    """What a sentence is about."""
    return getattr(case, "subject", None) or str(case)
