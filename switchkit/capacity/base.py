"""What every capacity policy is."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from switchkit.kernels.usable import usable
from switchkit.records import Routing, normalized

__all__ = [
    "CapacityFactory",
    "CapacityPolicy",
    "Order",
    "place",
    "place_by_arrival",
    "placed_by",
    "renormalize",
    "unfair",
]

Order = Literal["arrival", "first_choices", "probability", "random"]
FEW = 2**14
"""Assignments times experts up to which counting beats sorting, on a CPU, by its fewer operations."""
MANY = 2**16
"""Assignments of a group up to which a kernel counts on a GPU; more are sorted: each of its programs walks all."""


class CapacityPolicy:
    """Decides how many tokens of a group an expert takes (`limit`) and which ones (`place`). Holds no parameters."""

    order: Order = "arrival"
    """Who is served first where not all fit, see `place`."""

    @property
    def serves_by(self) -> str | None:
        """The option that says who is served, and so has no say where experts choose; None: those who come first."""
        return None if self.order == "arrival" else f"order={self.order!r}"

    def leaks(self, k: int) -> str | None:
        """Why a causal model whose tokens make k choices would see the future with this policy; None: it would not."""
        return None

    def limit(self, S: int, E: int, K: int, *, training: bool) -> int | None:
        """Tokens that an expert takes from a group of S tokens that make K choices each; None: as many as come.

        S is the group's static length, padding included, so that the answer is known without reading the data.
        """
        raise NotImplementedError

    def place(self, routing: Routing, limit: int | None, *, training: bool) -> Routing:
        """The routing with `slot`, `kept`, `load` and `capacity` filled in, served in this policy's order.

        A router that placed its assignments itself is left alone. A policy of your own that keeps others changes
        `kept` alone: in a layer, `slot` and `taken` then follow from it (`placed_by`).
        """
        if routing.slot is not None:
            return routing
        return renormalize(self.serve(routing, limit, training=training))

    def serve(self, routing: Routing, limit: int | None, *, training: bool) -> Routing:
        """What `place` fills in, weights apart. Its slots and counts are used as they are: see `Routing`."""
        order = "arrival" if limit is None or (self.order == "random" and not training) else self.order
        return place(routing, limit, order)


class CapacityFactory(Protocol):
    """Anything that builds a capacity policy: a class, a `functools.partial`, a YAML part."""

    def __call__(self) -> CapacityPolicy: ...


def placed_by(policy: CapacityPolicy, routing: Routing, limit: int | None, *, training: bool) -> Routing:
    """What `policy.place` gives; where that is a method of somebody's own, `slot` and `taken` are counted from `kept`.

    Dispatchers put an assignment in the row of its slot: a gap that a dropped one left would be another's row.

    Raises:
        ValueError: a `place` that left `kept` or `load` out.
    """
    found = policy.place(routing, limit, training=training)
    if type(policy).place is CapacityPolicy.place or found is routing or found.share is not None:
        return found
    if found.kept is None or found.load is None:
        raise ValueError(
            f"{type(policy).__name__}.place returned a routing without kept or load: give both, for instance by "
            "dataclasses.replace(super().place(routing, limit, training=training), kept=...)"
        )
    queue = place_by_arrival(replace(found, chosen=found.kept), None)
    return replace(found, slot=queue.slot, taken=queue.load)


def place(routing: Routing, limit: int | None, order: Order = "arrival") -> Routing:
    """The assignments of each expert in a queue; the first `limit` of a group are kept.

    "arrival": token by token, so that no token pushes out an earlier one, for every k. "first_choices": all first
    choices before any second (arXiv 2006.16668); an irregular list, which has no first choices, by arrival.
    "probability": the largest weight first (Megatron-LM). "random": a draw from torch's generator.
    """
    if order == "arrival":
        return place_by_arrival(routing, limit)
    groups, n = routing.expert.shape
    if order == "first_choices":
        late = torch.arange(n, device=routing.expert.device) % (routing.k or 1)
        late = late.expand(groups, n)
    elif order == "probability":
        late = -routing.weight.detach()
    else:
        late = torch.rand(groups, n, device=routing.expert.device)
    # Stable, so that equals are served by arrival.
    turn = late.argsort(dim=-1, stable=True)
    queue = replace(routing, expert=routing.expert.gather(-1, turn), chosen=routing.chosen.gather(-1, turn))
    served = place_by_arrival(queue, limit)
    assert served.slot is not None
    assert served.kept is not None
    slot = torch.empty_like(served.slot).scatter_(-1, turn, served.slot)
    kept = torch.empty_like(served.kept).scatter_(-1, turn, served.kept)
    return replace(routing, slot=slot, kept=kept, load=served.load, capacity=limit)


def place_by_arrival(routing: Routing, limit: int | None) -> Routing:
    """First come, first served: assignments in the list's order take slots 0, 1, ... of their expert."""
    groups, n = routing.expert.shape
    experts = routing.logits.shape[-1]
    if n == 1:
        # Decoding token by token: nobody queues.
        load = torch.zeros(groups, experts, dtype=torch.long, device=routing.expert.device)
        load = load.scatter(1, routing.expert, routing.chosen.long())
        return replace(routing, slot=torch.zeros_like(routing.expert), kept=routing.chosen, load=load, capacity=limit)
    if usable(routing.expert) and n <= MANY:
        from switchkit.kernels.order import queue

        slot, load = queue(routing.expert, routing.chosen, experts)
    else:
        slot, load = (_counted if 0 < groups * n * experts <= FEW else _queued)(routing)
    kept = routing.chosen if limit is None else routing.chosen & (slot < limit)
    return replace(routing, slot=slot, kept=kept, load=load, capacity=limit)


def _counted(routing: Routing) -> tuple[Int[Tensor, "G N"], Int[Tensor, "G E"]]:
    """Slot and load by counting who came before: few operations, which cost more with more experts."""
    expert = routing.expert.unsqueeze(-1)
    experts = torch.arange(routing.logits.shape[-1], device=expert.device)
    count = ((expert == experts) & routing.chosen.unsqueeze(-1)).cumsum(1)
    return count.gather(-1, expert).squeeze(-1) - 1, count[:, -1]


def _queued(routing: Routing) -> tuple[Int[Tensor, "G N"], Int[Tensor, "G E"]]:
    """Slot and load by one sort."""
    groups, n = routing.expert.shape
    experts = routing.logits.shape[-1]
    # What was not chosen queues for one expert too many, where it takes no real slot.
    key = torch.where(routing.chosen, routing.expert, experts)
    key = key + torch.arange(groups, device=key.device).unsqueeze(-1) * (experts + 1)
    load = torch.zeros(groups * (experts + 1), dtype=torch.long, device=key.device)
    load = load.scatter_add_(0, key.flatten(), torch.ones_like(key).flatten())
    start = load.cumsum(0) - load
    queue, order = key.flatten().sort(stable=True)
    place = torch.arange(groups * n, device=key.device) - start[queue]
    slot = torch.empty_like(order).scatter_(0, order, place).view(groups, n)
    return slot, load.view(groups, experts + 1)[:, :experts]


def renormalize(routing: Routing) -> Routing:
    """The weights of each token divided by the sum of its kept ones, times `scale`, where the router asked for it."""
    if not routing.renormalize:
        return routing
    assert routing.kept is not None
    given = routing.weight if routing.given is None else routing.given
    return replace(routing, weight=normalized(routing, routing.weight, routing.kept), given=given)


def unfair(order: Order, k: int) -> str | None:
    """Why an order of service depends on later tokens; None: it does not."""
    if order == "arrival" or (order == "first_choices" and k == 1):
        return None
    served = {
        "first_choices": "first choices of later tokens are served before second choices of earlier ones",
        "probability": "later tokens of higher probability push out earlier ones",
        "random": "any token may push out an earlier one",
    }
    return f"with order={order!r} {served[order]}"
