"""One property that is asked of a part, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from switchkit.testing.expect import Broken

__all__ = ["Question", "Result", "ask", "when"]


@dataclass(frozen=True)
class Result:
    """What came of one property of one part, over all cases it was asked in."""

    property: str
    status: Literal["held", "failed", "skipped"]
    detail: str
    """The sentence of a failure, or why the property was not asked; empty where it held."""
    seconds: float


@dataclass(frozen=True)
class Question:
    """A property, the cases it is asked in, or the reason why it is not asked."""

    function: Callable[..., None]
    cases: Sequence[Any]
    options: Mapping[str, Any]
    reason: str | None = None

    @property
    def name(self) -> str:
        return self.function.__name__

    def answer(self, subject: str, skip: Sequence[str]) -> Result:
        """Ask it."""
        if self.name in skip:
            return Result(self.name, "skipped", "left out on request", 0.0)
        if self.reason is not None:
            return Result(self.name, "skipped", self.reason, 0.0)
        start = time.perf_counter()
        for case in self.cases:
            try:
                self.function(case, **self.options)
            except Broken as broken:
                return Result(self.name, "failed", str(broken), time.perf_counter() - start)
            except Exception as error:
                what = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
                told = f"{subject}: raised {what}: it cannot train where this is asked ({_doc(self.function)})"
                return Result(self.name, "failed", told, time.perf_counter() - start)
        return Result(self.name, "held", "", time.perf_counter() - start)


def _doc(function: Callable[..., None]) -> str:
    return (function.__doc__ or function.__name__).partition("\n")[0].rstrip(".")


def ask(function: Callable[..., None], *cases: Any, unless: str | None = None, **options: Any) -> Question:
    """A question in some cases; `unless` is the reason why it is not asked."""
    return Question(function, cases, options, unless)


def when(condition: object, reason: str) -> str | None:
    return reason if condition else None
