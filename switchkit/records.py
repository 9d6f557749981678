"""What one sparse layer decided, and the rows it sends to its experts.

Shape letters of the whole package:

    B batch            S tokens of a group   G groups           E experts        K choices of a token
    N assignments of a group (S*K when tokens choose, E*C when experts choose)   C capacity
    D model width      F expert width        H heads            L layers         V vocabulary
    R rows that experts compute on
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Routing", "Rows", "load", "mean_probs", "mean_square_logsumexp"]


@dataclass(frozen=True)
class Routing:
    """The decisions of one sparse layer: a flat list of N assignments per group.

    A router fills everything but `slot`, `kept` and `load`, which the capacity policy's `place` adds; assignments are
    masked, never compacted. One list serves routers where tokens choose and where experts choose.
    """

    logits: Float[Tensor, "G S E"]
    """Before noise; float32 for half-precision inputs, else the input's own dtype."""
    probs: Float[Tensor, "G S E"]
    """What the balance loss sees."""
    token: Int[Tensor, "G N"]
    """Which token of the group ..."""
    expert: Int[Tensor, "G N"]
    """... goes to which expert ..."""
    weight: Float[Tensor, "G N"]
    """... and with what weight its output comes back."""
    chosen: Bool[Tensor, "G N"]
    """The router made this assignment, for a real token. Unsent second choices, zero gates and padding are False."""
    valid: Bool[Tensor, "G S"]
    """True: a real token; False: padding."""
    batch: int = 0
    """Sequences in the batch (the layer fills it in), so that a loss can view [B, -1, E] whatever the groups."""
    k: int | None = None
    """Choices of every token, when the list is regular (S*k, token by token); None: irregular, as in expert choice."""
    capacity: int | None = None
    """Tokens an expert takes from a group; None: dropless."""
    slot: Int[Tensor, "G N"] | None = None
    """Place in the expert's buffer, 0, 1, ... for the chosen ones; meaningless for others."""
    kept: Bool[Tensor, "G N"] | None = None
    """Chosen and within capacity. Dropped: chosen and not kept."""
    load: Int[Tensor, "G E"] | None = None
    """Chosen assignments per expert, before the drop."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """What one router's own loss needs, named in that router's docstring."""


@dataclass(frozen=True)
class Rows:
    """Tokens arranged for the experts, in one of two layouts.

    *Sorted*: `x` is [R, D], all rows of expert 0 first, then expert 1, ...; rows past ``load.sum()`` belong to no
    expert, which must return zeros for them.
    *Padded*: `x` is [E, R, D], the first ``load[e]`` rows of each expert are meaningful, the rest are zero.
    """

    x: Float[Tensor, "*layout D"]
    load: Int[Tensor, "E"]
    """Rows of each expert."""
    sizes: tuple[int, ...] | None = None
    """`load` as Python integers where they are known without a wait for the device; None: only the tensor."""
    row: Int[Tensor, "G N"] | None = None
    """Where each assignment went, for the dispatcher's own `combine` ..."""
    source: Int[Tensor, "R"] | None = None
    """... and, in the sorted layout, which flat assignment each row came from."""


def load(routing: Routing) -> Int[Tensor, "E"]:
    """Chosen assignments per expert over all groups, before the drop."""
    if routing.load is None:
        raise ValueError("this routing was not placed yet: call capacity.place(routing, limit) first")
    return routing.load.sum(0)


def mean_probs(routing: Routing) -> Float[Tensor, "E"]:
    """Mean probability of each expert over the real tokens; zeros when there is none."""
    total = routing.probs.masked_fill(~routing.valid.unsqueeze(-1), 0).sum((0, 1))
    return total / routing.valid.sum().clamp(min=1)


def mean_square_logsumexp(routing: Routing) -> Float[Tensor, ""]:
    """Mean over the real tokens of ``logsumexp(logits) ** 2``; zero when there is none."""
    square = routing.logits.logsumexp(-1).square().masked_fill(~routing.valid, 0)
    return square.sum() / routing.valid.sum().clamp(min=1)
