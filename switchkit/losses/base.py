"""What every routing loss is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from switchkit.checks import one_of
from switchkit.records import Routing, load
from switchkit.registry import name_of

__all__ = ["Loss", "LossFactory", "alone", "built", "by_stack", "check_stacks", "names_of", "over_layers"]

Item = TypeVar("Item")


class Loss:
    """A term of the training loss, computed from the records of all sparse layers and scaled by `weight` outside.

    `weight` may be changed during training by a schedule. Without sparse layers, and without a real token, the term
    is zero. A loss has no parameters of its own: they would be neither trained nor saved. What it is to learn belongs
    into the router, which hands it on in the record's `extras`.

    Raises:
        ValueError: a weight that is negative or not finite.
    """

    def __init__(self, weight: float) -> None:
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"the weight of a loss must be a finite number >= 0; got {weight}")
        self.weight = weight

    scope: Literal["micro", "rank", "global"] = "micro"
    """Whose counts the term reads: of the micro-batch alone, or of all of the optimizer step so far, on this rank or on
    all. With the last two the module that trains calls it with a second argument: those counts, [L, E]."""

    def __call__(self, routings: Sequence[Routing]) -> Float[Tensor, ""]:
        """The unweighted term."""
        raise NotImplementedError


class LossFactory(Protocol):
    """Anything that builds a loss: a class, a `functools.partial`, a YAML part."""

    def __call__(self) -> Loss: ...


def built(losses: Sequence[LossFactory]) -> list[Loss]:
    """The terms of the loss.

    Raises:
        ValueError: no list, or a loss that lacks what `Loss` sets, has another word for its `scope`, or has parameters
            or buffers.
    """
    if not isinstance(losses, (list, tuple)):
        raise ValueError(f"losses must be a list of classes or functools.partials, such as [Balance]; got {losses!r}")
    built = [factory() for factory in losses]
    for term in built:
        if not hasattr(term, "weight"):
            raise ValueError(f"the loss {type(term).__name__} has no weight: call super().__init__(weight) in its own")
        if _holds_tensors(term):
            raise ValueError(
                f"the loss {type(term).__name__} has parameters or buffers, which would be neither trained nor saved: "
                "put them into the router, and hand them on in the extras of its record"
            )
        scope = str(getattr(term, "scope", None))
        one_of(f"scope of the loss {type(term).__name__}", scope, ("micro", "rank", "global"))
    return built


def _holds_tensors(term: Loss) -> bool:
    """Whether a loss is, or has as an attribute, what torch would train or save."""
    held = [term] if isinstance(term, nn.Module) else list(vars(term).values())
    return any(
        isinstance(part, nn.Parameter) or (isinstance(part, nn.Module) and bool(part.state_dict())) for part in held
    )


def alone(term: Loss, routings: Sequence[Routing]) -> Float[Tensor, ""]:
    """The term as an optimizer step of this micro-batch alone has it: with its own counts, where it reads any."""
    if term.scope == "micro":
        return term(routings)
    loads = [load(routing) for routing in routings]
    counted = pad_sequence(loads, batch_first=True) if loads else torch.zeros(0, 0, dtype=torch.long)
    return term(routings, counted)  # type: ignore[call-arg]


def names_of(losses: Sequence[Loss]) -> list[str]:
    """What each is logged as: its name, with a number from the second of a kind on."""
    names = [name_of(type(term)) for term in losses]
    before = [names[:number].count(name) for number, name in enumerate(names)]
    return [name if count == 0 else f"{name}_{count + 1}" for name, count in zip(names, before, strict=True)]


def by_stack(routings: Sequence[Item], stacks: Sequence[int]) -> list[Sequence[Item]]:
    """The records of each stack of a model, in order: so many layers each.

    Raises:
        ValueError: numbers that do not add up to the records.
    """
    if sum(stacks) != len(routings):
        raise ValueError(f"stacks={list(stacks)} has {sum(stacks)} sparse layers, but the model has {len(routings)}")
    ends = list(accumulate(stacks))
    return [routings[end - size : end] for size, end in zip(stacks, ends, strict=True)]


def check_stacks(stacks: Sequence[int] | None) -> list[int] | None:
    """`stacks`, or a ValueError that says what they are."""
    if stacks is not None and any(size < 0 for size in stacks):
        raise ValueError(f"stacks must be numbers of sparse layers, such as [6, 6]; got {list(stacks)}")
    return None if stacks is None else list(stacks)


def over_layers(terms: Sequence[Float[Tensor, ""]], how: str) -> Float[Tensor, ""]:
    """The "mean" or the "sum" of one term per sparse layer; zero when there is none.

    Never pooled before the product: two collapsed layers would cancel each other.
    """
    one_of("layers", how, ("mean", "sum"))
    if not terms:
        return torch.zeros(())
    total = torch.stack(tuple(terms))
    return total.mean() if how == "mean" else total.sum()
