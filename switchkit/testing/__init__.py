"""A conformance kit for parts of your own: what switchkit's own parts are held to, run on yours.

In a test of your own::

    from switchkit.testing import check_router

    def test_my_router() -> None:
        check_router(MyRouter, k=2)

`check_router`, `check_capacity`, `check_experts`, `check_loss` and `check_dispatcher` take the class and options of its
constructor, build small layers around it on the CPU in float64, and raise `Broken` with one sentence per property that
does not hold: what was seen, what was expected, what it breaks in training. `run_router` and its like return the
results instead; ``switchkit selftest`` prints them for everything registered. Nothing beyond switchkit's own
dependencies is needed, and ``python -O`` checks as much.

What cannot be asked of a part is found by looking at it: a router that draws random numbers in training, or lists its
assignments irregularly, needs no declaration. Declared on the class are `leaks`, `needs_ids`, `by_position`,
`full` and `uneven`; nothing here finds a missing one of the last three: ``switchkit audit`` asks about `by_position`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from switchkit.capacity.base import CapacityPolicy
from switchkit.dispatch.base import Dispatcher
from switchkit.experts.base import Experts
from switchkit.losses.base import Loss
from switchkit.routing.base import Router
from switchkit.testing.expect import Broken
from switchkit.testing.kit import Result, results_of

__all__ = [
    "Broken",
    "Result",
    "check_capacity",
    "check_dispatcher",
    "check_experts",
    "check_loss",
    "check_router",
    "run_capacity",
    "run_dispatcher",
    "run_experts",
    "run_loss",
    "run_router",
]

Around = Callable[[], AbstractContextManager[Any]]


def check_router(cls: type[Router], *, skip: Sequence[str] = (), **options: Any) -> None:
    """Hold a router to everything that switchkit's own are held to.

    `skip` names properties to leave out (`Result.property`); `options` are those of the constructor. `k` is 2 where the
    constructor has it and nothing else is given.

    Raises:
        Broken: some properties do not hold, one sentence for each.
        ValueError: no subclass of `Router`, or an unknown name in `skip`.
    """
    _raise(run_router(cls, options, skip=skip))


def check_capacity(cls: type[CapacityPolicy], *, skip: Sequence[str] = (), **options: Any) -> None:
    """Hold a capacity policy to everything that switchkit's own are held to; choose options that drop some of 7 tokens.

    Raises:
        Broken: some properties do not hold, one sentence for each.
        ValueError: no subclass of `CapacityPolicy`, or an unknown name in `skip`.
    """
    _raise(run_capacity(cls, options, skip=skip))


def check_experts(cls: type[Experts], *, skip: Sequence[str] = (), **options: Any) -> None:
    """Hold experts to everything that switchkit's own are held to, in both layouts of the rows.

    Raises:
        Broken: some properties do not hold, one sentence for each.
        ValueError: no subclass of `Experts`, or an unknown name in `skip`.
    """
    _raise(run_experts(cls, options, skip=skip))


def check_loss(
    cls: type[Loss], *, router: str | type[Router] | None = None, skip: Sequence[str] = (), **options: Any
) -> None:
    """Hold a loss to everything that switchkit's own are held to, on records of `router`.

    Without a `router` the first of top_k, noisy_top_k, relu and soft is taken whose records the loss reads.

    Raises:
        Broken: some properties do not hold, one sentence for each.
        ValueError: no subclass of `Loss`, or an unknown name in `skip`.
    """
    _raise(run_loss(cls, options, router=router, skip=skip))


def check_dispatcher(cls: type[Dispatcher], *, skip: Sequence[str] = (), **options: Any) -> None:
    """Hold a dispatcher to everything that switchkit's own are held to, in layers of every part that switchkit has.

    Raises:
        Broken: some properties do not hold, one sentence for each.
        ValueError: no subclass of `Dispatcher`, or an unknown name in `skip`.
    """
    _raise(run_dispatcher(cls, options, skip=skip))


def run_router(
    cls: type[Router],
    options: Mapping[str, Any] | None = None,
    *,
    skip: Sequence[str] = (),
    around: Around = nullcontext,
) -> list[Result]:
    """What `check_router` asks, as a list of results. `around` is entered where torch.compile traces the layer."""
    return list(results_of(Router, cls, options or {}, skip, around))


def run_capacity(
    cls: type[CapacityPolicy],
    options: Mapping[str, Any] | None = None,
    *,
    skip: Sequence[str] = (),
    around: Around = nullcontext,
) -> list[Result]:
    """What `check_capacity` asks, as a list of results."""
    return list(results_of(CapacityPolicy, cls, options or {}, skip, around))


def run_experts(
    cls: type[Experts],
    options: Mapping[str, Any] | None = None,
    *,
    skip: Sequence[str] = (),
    around: Around = nullcontext,
) -> list[Result]:
    """What `check_experts` asks, as a list of results."""
    return list(results_of(Experts, cls, options or {}, skip, around))


def run_loss(
    cls: type[Loss],
    options: Mapping[str, Any] | None = None,
    *,
    router: str | type[Router] | None = None,
    skip: Sequence[str] = (),
) -> list[Result]:
    """What `check_loss` asks, as a list of results."""
    return list(results_of(Loss, cls, {**(options or {}), "router": router}, skip))


def run_dispatcher(
    cls: type[Dispatcher],
    options: Mapping[str, Any] | None = None,
    *,
    skip: Sequence[str] = (),
    around: Around = nullcontext,
) -> list[Result]:
    """What `check_dispatcher` asks, as a list of results."""
    return list(results_of(Dispatcher, cls, options or {}, skip, around))


def _raise(results: Sequence[Result]) -> None:
    failed = [result.detail for result in results if result.status == "failed"]
    if failed:
        raise Broken("\n".join(failed))
