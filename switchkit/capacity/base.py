"""What every capacity policy is."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from switchkit.records import Routing

__all__ = ["CapacityFactory", "CapacityPolicy", "place_by_arrival"]


class CapacityPolicy:
    """Decides how many tokens of a group an expert takes (`limit`) and which ones (`place`). Holds no parameters."""

    leaks: str | None = None
    """Why a causal model would see the future with this policy; None: it would not."""

    def limit(self, S: int, E: int, K: int, *, training: bool) -> int | None:
        """Tokens that an expert takes from a group of S tokens that make K choices each; None: as many as come.

        S is the group's static length, padding included, so that the answer is known without reading the data.
        """
        raise NotImplementedError

    def place(self, routing: Routing, limit: int | None, *, training: bool) -> Routing:
        """The routing with `slot`, `kept`, `load` and `capacity` filled in; token by token, in order of arrival.

        A router that placed its assignments itself is left alone.
        """
        return routing if routing.slot is not None else place_by_arrival(routing, limit)


class CapacityFactory(Protocol):
    """Anything that builds a capacity policy: a class, a `functools.partial`, a YAML part."""

    def __call__(self) -> CapacityPolicy: ...


def place_by_arrival(routing: Routing, limit: int | None) -> Routing:
    """First come, first served: assignments in the list's order take slots 0, 1, ... of their expert.

    The list runs token by token, so no token can push out an earlier one: the order is causal for every k.
    """
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
    kept = routing.chosen if limit is None else routing.chosen & (slot < limit)
    return replace(routing, slot=slot, kept=kept, load=load.view(groups, experts + 1)[:, :experts], capacity=limit)
