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
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Routing", "Rows", "entropy", "load", "mean_probs", "mean_square_logsumexp"]


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
    """Sequences in the batch, which the layer fills in: they lie one after another in the groups' flat tokens ..."""
    length: int | None = None
    """... each of so many tokens, padding counted; what follows fills up the last group. None: not known."""
    k: int | None = None
    """Choices of every token, when the list is regular (S*k, token by token); None: irregular, as in expert choice."""
    ranked: bool = True
    """Of k choices the first is a token's best; False: a list of all experts in order, in which none is first."""
    capacity: int | None = None
    """Tokens an expert takes from a group; None: dropless."""
    renormalize: bool = False
    """The capacity policy divides each token's weights by the sum of the kept ones ..."""
    scale: float = 1.0
    """... and multiplies them by this."""
    slot: Int[Tensor, "G N"] | None = None
    """Place in the expert's buffer, 0, 1, ... for the kept ones; meaningless for others."""
    kept: Bool[Tensor, "G N"] | None = None
    """Chosen and within capacity. Dropped: chosen and not kept."""
    load: Int[Tensor, "G E"] | None = None
    """Chosen assignments per expert, before the drop."""
    taken: Int[Tensor, "G E"] | None = None
    """Kept assignments per expert, where that is not the load up to the capacity (overflow elsewhere, more drops)."""
    asked: Int[Tensor, "G N"] | None = None
    """The expert that the router chose, where overflow went elsewhere; None: `expert`. Balance losses read this one."""
    given: Float[Tensor, "G N"] | None = None
    """The weight that the router gave, where the capacity policy changed it; None: `weight`."""
    share: Float[Tensor, "G N"] | None = None
    """Part of the token in its slot, where slots are mixtures of tokens (Soft MoE); None: 1."""
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
    """Rows of each expert, those of zeros that a dispatcher filled up with included."""
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
    # Masked on both sides: what is not finite in padding would have a gradient of NaN, not of zero.
    logits = routing.logits.masked_fill(~routing.valid.unsqueeze(-1), 0)
    square = logits.logsumexp(-1).square().masked_fill(~routing.valid, 0)
    return square.sum() / routing.valid.sum().clamp(min=1)


Per = Literal["batch", "group", "sequence"]
"""What to count over: the batch as a whole, or each of its groups or sequences, a row each."""

# What losses read beyond that.

__all__ += [
    "asked_expert",
    "count_choices",
    "count_sent",
    "count_tokens",
    "experts_of",
    "kept_ones",
    "mean_entropy",
    "normalized",
    "per_token",
    "spans",
    "sum_probs",
    "sum_weights",
    "target_k",
    "undropped_weights",
]


def kept_ones(routing: Routing) -> Bool[Tensor, "G N"]:
    """Which assignments found room.

    Raises:
        ValueError: a routing that was not placed.
    """
    if routing.kept is None:
        raise ValueError("this routing was not placed yet: call capacity.place(routing, limit) first")
    return routing.kept


def asked_expert(routing: Routing) -> Int[Tensor, "G N"]:
    """The expert that the router chose for each assignment, wherever the capacity policy sent it."""
    return routing.expert if routing.asked is None else routing.asked


def experts_of(routing: Routing, *, asked: bool = False) -> Bool[Tensor, "G S E"]:
    """Which experts each token was sent to, dropped or not; `asked`: those that the router chose."""
    groups, size, experts = routing.logits.shape
    expert = asked_expert(routing) if asked else routing.expert
    found = torch.zeros(groups, size * experts, dtype=torch.long, device=routing.token.device)
    found.scatter_add_(1, routing.token * experts + expert, routing.chosen.long())
    return found.view(groups, size, experts) > 0


def spans(routing: Routing, per: Per) -> tuple[int, int]:
    """How many rows `per` cuts the flat tokens into, and the tokens of each; padding may follow the last one.

    Raises:
        ValueError: sequences, of a record that no layer has filled in, of groups that are neither one each nor the
            batch: their last one may be filled up.
    """
    groups, size = routing.valid.shape
    if per == "batch":
        return 1, groups * size
    if per == "group":
        return groups, size
    if routing.length is not None:
        return routing.batch, routing.length
    batch = routing.batch or groups
    if groups != batch and (groups != 1 or size % batch):
        raise ValueError(
            f"{batch} sequences are routed in {groups} groups of {size} tokens, which do not tell them apart: give the "
            "length of a sequence, which MoELayer writes into the record"
        )
    return batch, groups * size // max(batch, 1)


def count_tokens(routing: Routing, per: Per = "batch") -> Int[Tensor, "rows"]:
    """Real tokens."""
    return _by_row(routing, routing.valid, per).sum(1)


def count_choices(
    routing: Routing, per: Per = "batch", *, kept: bool = False, first: bool = False
) -> Int[Tensor, "rows E"]:
    """Chosen assignments per expert; `kept`: those within capacity only, `first`: the first choice of each token only.

    Overflow that went elsewhere counts for the expert that the router chose; of what is kept, for the one that has it.

    Raises:
        ValueError: a routing that was not placed, or first choices where tokens make no list of k choices.
    """
    if per == "batch" and not kept and not first:
        return load(routing).unsqueeze(0)
    made = kept_ones(routing) if kept else routing.chosen
    if first:
        if routing.k is None or not routing.ranked or "k" in routing.extras:
            raise ValueError(
                "first choices need a router where every token makes k choices, best first (switch, top_k, ...); with "
                "this one (expert_choice, soft, relu, local_experts, ...) count choices='all'"
            )
        # The list runs token by token, so choice j of token t is at t * k + j.
        made = made & (torch.arange(made.shape[1], device=made.device) % routing.k == 0)
    return _count(routing, routing.expert if kept else asked_expert(routing), made, per)


def count_sent(routing: Routing, devices: int, per: Per = "batch") -> Int[Tensor, "rows devices"]:
    """Tokens whose router chose some expert of each of `devices` equal runs, each token counted once."""
    groups, size, experts = routing.logits.shape
    sent = experts_of(routing, asked=True).view(groups, size, devices, experts // devices).any(-1)
    return _by_row(routing, sent, per).sum(1)


def sum_probs(routing: Routing, per: Per = "batch") -> Float[Tensor, "rows E"]:
    """Sum of the probabilities of each expert over the real tokens."""
    return _by_row(routing, routing.probs.masked_fill(~routing.valid.unsqueeze(-1), 0), per).sum(1)


def sum_weights(routing: Routing) -> Float[Tensor, "E"]:
    """Sum of the weights of the chosen assignments of each expert that the router chose, before the drop."""
    weight = undropped_weights(routing).masked_fill(~routing.chosen, 0)
    expert = asked_expert(routing).masked_fill(~routing.chosen, 0)
    return weight.new_zeros(routing.logits.shape[-1]).scatter_add(0, expert.flatten(), weight.flatten())


def undropped_weights(routing: Routing) -> Float[Tensor, "G N"]:
    """The weights that the assignments would have if every one were kept by the expert that the router chose."""
    if routing.given is None:
        return routing.weight
    return normalized(routing, routing.given, routing.chosen) if routing.renormalize else routing.given


def normalized(routing: Routing, weight: Float[Tensor, "G N"], among: Bool[Tensor, "G N"]) -> Float[Tensor, "G N"]:
    """`weight` divided by the sum of its token's assignments in `among`, where that is above 0, times `scale`."""
    total = per_token(routing, weight.masked_fill(~among, 0)).gather(-1, routing.token)
    weight = weight / torch.where(total > 0, total, 1)
    return weight if routing.scale == 1 else routing.scale * weight


def per_token(routing: Routing, values: Float[Tensor, "G N"]) -> Float[Tensor, "G S"]:
    """The sum over each token's assignments."""
    if routing.k is not None:
        return values.view(*routing.valid.shape, routing.k).sum(-1)
    return values.new_zeros(routing.valid.shape).scatter_add(-1, routing.token, values)


def mean_entropy(routing: Routing) -> Float[Tensor, ""]:
    """Mean over the real tokens of the entropy of the router's distribution, in nats; zero when there is none."""
    probs = routing.probs.masked_fill(~routing.valid.unsqueeze(-1), 0)
    return entropy(probs).sum() / count_tokens(routing).clamp(min=1).squeeze(0)


def entropy(weights: Float[Tensor, "*any E"]) -> Float[Tensor, "*any"]:
    """Entropy in nats of non-negative weights, divided by their sum; zero where all are zero."""
    tiny = torch.finfo(weights.dtype).tiny
    p = weights / weights.sum(-1, keepdim=True).clamp(min=tiny)
    # Bounded below: p log p has an infinite slope at 0, which times a saturated softmax would be NaN.
    return -(p * p.clamp(min=tiny).log()).sum(-1)


def target_k(routing: Routing) -> Float[Tensor, ""] | int | float:
    """The mean number of choices that the router aims at: `extras["k"]` (relu), else `k`, else the list's by token."""
    own = routing.extras.get("k", routing.k)
    return routing.expert.shape[1] / max(routing.valid.shape[1], 1) if own is None else own


def _by_row(routing: Routing, x: Tensor, per: Per) -> Tensor:
    """[G, S, ...] -> [rows, tokens, ...]."""
    rows, size = spans(routing, per)
    return x.flatten(0, 1)[: rows * size].view(rows, size, *x.shape[2:])


def _count(routing: Routing, expert: Tensor, made: Tensor, per: Per) -> Int[Tensor, "rows E"]:
    """How many of the assignments in `made` each expert of `expert` has, by the row of their token."""
    (groups, width, experts), (rows, size) = routing.logits.shape, spans(routing, per)
    first = torch.arange(groups, device=expert.device).unsqueeze(-1) * width
    row = (first + routing.token) // max(size, 1)
    at = (row * experts + expert).masked_fill(~made, 0).flatten()
    counts = torch.zeros(rows * experts, dtype=torch.long, device=expert.device)
    return counts.scatter_add_(0, at, made.flatten().long()).view(rows, experts)
