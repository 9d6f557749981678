"""What every dispatcher is."""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from switchkit.records import Routing, Rows

__all__ = [
    "Dispatcher",
    "DispatcherFactory",
    "flat_tokens",
    "kept_load",
    "largest",
    "mix_slots",
    "placed",
    "starts",
    "sum_choices",
    "unmix_slots",
]


class Dispatcher:
    """Arranges tokens for the experts by a routing (`dispatch`) and brings their outputs back (`combine`).

    It has no parameters and never changes a result beyond rounding, in outputs and in every gradient. Differentiable
    once.
    """

    def dispatch(self, tokens: Float[Tensor, "G S D"], routing: Routing) -> Rows:
        """The kept tokens as the rows that experts compute on."""
        raise NotImplementedError

    def combine(self, out: Float[Tensor, "*layout D"], rows: Rows, routing: Routing) -> Float[Tensor, "G S D"]:
        """Each token's sum of ``weight * output`` over its kept assignments; zero where there is none."""
        raise NotImplementedError


class DispatcherFactory(Protocol):
    """Anything that builds a dispatcher: a class, a `functools.partial`, a YAML part."""

    def __call__(self) -> Dispatcher: ...


def placed(routing: Routing) -> tuple[Int[Tensor, "G N"], Bool[Tensor, "G N"], Int[Tensor, "G E"]]:
    """`slot`, `kept` and `load` of a routing that has them.

    Raises:
        ValueError: the routing was not placed yet.
    """
    if routing.slot is None or routing.kept is None or routing.load is None:
        raise ValueError("this routing was not placed yet: call capacity.place(routing, limit) first")
    return routing.slot, routing.kept, routing.load


def kept_load(routing: Routing) -> Int[Tensor, "G E"]:
    """Kept assignments per group and expert; their slots are 0 ... kept_load - 1."""
    _, _, load = placed(routing)
    if routing.taken is not None:
        return routing.taken
    return load if routing.capacity is None else load.clamp(max=routing.capacity)


def starts(load: Int[Tensor, "G E"]) -> Int[Tensor, "G E"]:
    """First row of each group and expert when rows run expert by expert, and within an expert group by group."""
    by_expert = load.t().flatten()
    return (by_expert.cumsum(0) - by_expert).view(load.shape[1], load.shape[0]).t()


def flat_tokens(routing: Routing) -> Int[Tensor, "G N"]:
    """Index of each assignment's token in the flattened [G*S] tokens."""
    groups, size = routing.valid.shape
    return routing.token + torch.arange(groups, device=routing.token.device).unsqueeze(-1) * size


def sum_choices(values: Float[Tensor, "GN D"], routing: Routing) -> Float[Tensor, "G S D"]:
    """Sum over each token's assignments, whether the list is regular (a view) or not (an indexed addition)."""
    groups, size = routing.valid.shape
    if routing.k is not None:
        total = values if routing.k == 1 else values.view(groups * size, routing.k, values.shape[-1]).sum(1)
    else:
        zeros, token = values.new_zeros(groups * size, values.shape[-1]), flat_tokens(routing).flatten()
        if values.is_cuda:
            # `index_add` adds in whatever order there; this one sorts, so that two calls are equal bit for bit.
            total = zeros.index_put((token,), values, accumulate=True)
        else:
            total = zeros.index_add(0, token, values)
    return total.view(groups, size, values.shape[-1])


def mix_slots(tokens: Float[Tensor, "G S D"], routing: Routing) -> Rows:
    """Slots that are mixtures of tokens (`share`), as rows of equal number for each expert.

    The list runs token by token, and within a token slot by slot of expert 0, then of expert 1, ...
    """
    share = _per_slot(routing, routing.share).to(tokens.dtype)
    experts = routing.logits.shape[-1]
    slots = torch.einsum("gsr,gsd->grd", share, tokens)
    x = slots.view(len(slots), experts, share.shape[-1] // experts, slots.shape[-1]).transpose(0, 1).flatten(1, 2)
    return Rows(x=x, load=torch.full((experts,), x.shape[1], device=x.device))


def unmix_slots(out: Float[Tensor, "E R D"], routing: Routing) -> Float[Tensor, "G S D"]:
    """Each token's weighted sum over all slots."""
    weight = _per_slot(routing, routing.weight).to(out.dtype)
    slots = out.view(len(out), len(weight), weight.shape[-1] // len(out), out.shape[-1]).transpose(0, 1).flatten(1, 2)
    return torch.einsum("gsr,grd->gsd", weight, slots)


def _per_slot(routing: Routing, value: Tensor | None) -> Float[Tensor, "G S R"]:
    """A value per assignment as one per token and slot; zero where nothing is kept."""
    assert value is not None
    assert routing.kept is not None
    assert routing.k is not None
    groups, size, _ = routing.logits.shape
    return value.masked_fill(~routing.kept, 0).view(groups, size, routing.k)


def largest(load: Int[Tensor, "..."], bound: int) -> int:
    """The largest load, or a static `bound` of it where reading it would wait for the device or break the graph."""
    if torch.compiler.is_compiling() or load.device.type != "cpu":
        return bound
    return int(load.max()) if load.numel() else 0
