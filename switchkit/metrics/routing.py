"""Metrics of routing: sums as state, ratios last, so that batches and ranks add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from switchkit import stats
from switchkit.metrics.sums import Sums
from switchkit.records import Routing

__all__ = [
    "DroppedByPosition",
    "RoutingAgreement",
    "RoutingInformation",
    "RoutingMetrics",
    "imbalance_of",
    "step_stats",
]


class RoutingMetrics(Sums):
    """Load, drops and certainty per sparse layer, over all batches and ranks since the last reset.

    Update it with a module's `stats`. Computes

    - `load` [L, E]: share of the layer's assignments;
    - `imbalance` [L]: largest over mean load;
    - `max_violation` [L]: (largest - mean) / mean load, the MaxVio of arXiv 2408.15664;
    - `dead` [L]: experts that nothing was sent to;
    - `dropped` [L]: share of the chosen assignments;
    - with `scores`, means over the real tokens: `entropy` [L] of the probabilities, in nats, and `confidence` [L], the
      largest one.

    Args:
        num_layers: sparse layers.
        num_experts: experts of each, or one number per layer.
        scores: `entropy` and `confidence` too, which ``step_stats(routings, scores=True)`` adds up. Not in training by
            default: a logarithm of every probability costs more than all the rest.

    Raises:
        ValueError: numbers of experts for another number of layers.
    """

    load: Tensor
    dropped: Tensor
    tokens: Tensor
    entropy: Tensor
    confidence: Tensor

    def __init__(self, num_layers: int, num_experts: int | Sequence[int], *, scores: bool = False) -> None:
        super().__init__()
        each = [num_experts] * num_layers if isinstance(num_experts, int) else list(num_experts)
        if len(each) != num_layers:
            raise ValueError(f"num_experts must be one number or one for each of {num_layers} layers; got {each}")
        width = num_experts if isinstance(num_experts, int) else max(each, default=0)
        self.num_experts, self.scores = each, scores
        self.add_sum("load", num_layers, width)
        self.add_sum("dropped", num_layers)
        if scores:
            self.add_sum("tokens", num_layers)
            for name in ("entropy", "confidence"):
                self.add_sum(name, num_layers, dtype=torch.float64)

    def update(self, stats: Mapping[str, Tensor]) -> None:
        for name in self._defaults:
            getattr(self, name).add_(stats[name])

    def compute(self) -> dict[str, Tensor]:
        total = self.load.sum(-1)
        share = self.load / total.clamp(min=1).unsqueeze(-1)
        experts = torch.tensor(self.num_experts, dtype=torch.long, device=total.device)
        imbalance = imbalance_of(self.load, self.num_experts)
        found = {
            "load": share,
            "imbalance": imbalance,
            "max_violation": (imbalance - 1).clamp(min=0),
            "dead": experts - (self.load > 0).sum(-1),
            "dropped": self.dropped / total.clamp(min=1),
        }
        if self.scores:
            means = {name: getattr(self, name) / self.tokens.clamp(min=1) for name in ("entropy", "confidence")}
            found |= {name: value.float() for name, value in means.items()}
        return found


class DroppedByPosition(Sums):
    """Share of the chosen assignments that were dropped, by the token's place in its sequence: [L, context].

    A policy that serves in order of arrival drops late tokens; this shows how late. Update it with a model's routings;
    `length` of the sequences is for records that no layer has filled in.

    Args:
        num_layers: sparse layers.
        context: longest sequence.
    """

    chosen: Tensor
    dropped: Tensor

    def __init__(self, num_layers: int, context: int) -> None:
        super().__init__()
        self.num_layers, self.context = num_layers, context
        for name in ("chosen", "dropped"):
            self.add_sum(name, num_layers, context)

    def update(self, routings: Sequence[Routing], length: int | None = None) -> None:
        """Add a batch.

        Raises:
            ValueError: another number of layers, a record not placed yet, sequences longer than `context`, or of
                unknown length.
        """
        _check_layers(routings, self.num_layers)
        for layer, routing in enumerate(routings):
            own = stats.sequence_length(routing) if length is None else length
            if own > self.context:
                raise ValueError(f"sequences of {own} tokens are longer than context={self.context}")
            place = stats.position(routing, own).gather(1, routing.token).flatten()
            self.chosen[layer].scatter_add_(0, place, routing.chosen.flatten().long())
            self.dropped[layer].scatter_add_(0, place, stats.is_dropped(routing).flatten().long())

    def compute(self) -> Tensor:
        return self.dropped / self.chosen.clamp(min=1)


class RoutingAgreement(Sums):
    """Share of real tokens that two routings of the same batch send to the same set of experts, per layer: [L].

    The two may be two checkpoints, two precisions, or training mode and evaluation mode.

    Args:
        num_layers: sparse layers.
    """

    equal: Tensor
    tokens: Tensor

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.num_layers = num_layers
        for name in ("equal", "tokens"):
            self.add_sum(name, num_layers)

    def update(self, first: Sequence[Routing], second: Sequence[Routing]) -> None:
        """Add one batch, routed twice; the groups may differ, the tokens and the number of experts may not.

        Raises:
            ValueError: another number of layers, or of experts.
        """
        _check_layers(first, self.num_layers)
        _check_layers(second, self.num_layers)
        for layer, (a, b) in enumerate(zip(first, second, strict=True)):
            one, two = stats.experts_of(a).flatten(0, 1), stats.experts_of(b).flatten(0, 1)
            if one.shape[1] != two.shape[1]:
                raise ValueError(f"layer {layer} chose among {one.shape[1]} and {two.shape[1]} experts")
            # Ragged groups end in padding that the other grouping may not have.
            size = min(len(one), len(two))
            real = a.valid.flatten()[:size] & b.valid.flatten()[:size]
            self.equal[layer] += ((one[:size] == two[:size]).all(-1) & real).sum()
            self.tokens[layer] += real.sum()

    def compute(self) -> Tensor:
        return self.equal / self.tokens.clamp(min=1)


class RoutingInformation(Sums):
    """What the expert says about a label of the token, such as its speaker or language.

    Mutual information over assignments, ``sum p(e, z) log(p(e, z) / (p(e) p(z)))``. Computes ``{"nats": [L],
    "share": [L]}``: `share` is that over the entropy of the labels, 0 when the expert says nothing, 1 when it gives the
    label away. Few tokens overstate it, by about ``(E - 1)(Z - 1) / (2 * assignments)`` nats for Z labels.

    Args:
        num_layers: sparse layers.
        num_experts: experts of the widest layer.
        num_labels: labels; they are 0, 1, ..., and negative ones are left out.
    """

    joint: Tensor

    def __init__(self, num_layers: int, num_experts: int, num_labels: int) -> None:
        super().__init__()
        self.num_layers, self.num_labels = num_layers, num_labels
        shape = num_layers, num_experts, num_labels
        self.add_sum("joint", *shape)

    def update(self, routings: Sequence[Routing], labels: Int[Tensor, "B S"] | Sequence[Tensor]) -> None:
        """Add a batch and the label of each of its tokens; one tensor for each layer where layers have other tokens.

        Raises:
            ValueError: another number of layers.
        """
        _check_layers(routings, self.num_layers)
        of_layer = [labels] * len(routings) if isinstance(labels, Tensor) else labels
        for layer, (routing, own) in enumerate(zip(routings, of_layer, strict=True)):
            found = stats.joint_counts(routing, own, self.num_labels)
            self.joint[layer, : len(found)] += found

    def compute(self) -> dict[str, Tensor]:
        share = self.joint.double() / self.joint.sum((1, 2), keepdim=True).clamp(min=1)
        entropy = {dims: torch.special.entr(share.sum(dims)).sum(-1) for dims in (1, 2)}
        nats = (entropy[1] + entropy[2] - torch.special.entr(share).sum((1, 2))).clamp(min=0)
        return {"nats": nats, "share": torch.where(entropy[1] > 0, nats / entropy[1].clamp(min=1e-300), 0)}


def _check_layers(routings: Sequence[Routing], num_layers: int) -> None:
    if len(routings) != num_layers:
        raise ValueError(f"got the records of {len(routings)} sparse layers; this metric was made for {num_layers}")


def step_stats(
    routings: tuple[Routing, ...], beside: Tensor | None = None, *, scores: bool = False
) -> dict[str, Tensor]:
    """What callbacks get of a step, detached: `load` [L, E]; `dropped`, `tokens` and `bad_tokens`, all [L].

    With `scores`, also the sums over the real tokens `entropy` and `confidence` [L]. Of a model without sparse layers
    all are empty, on the device of `beside`.
    """
    if not routings:
        empty = torch.zeros(0, dtype=torch.long, device=None if beside is None else beside.device)
        names = ("dropped", "tokens", "bad_tokens", *(("entropy", "confidence") if scores else ()))
        return {"load": empty.view(0, 0), **dict.fromkeys(names, empty)}
    with torch.no_grad():
        found = {
            "load": _stack([stats.load(r) for r in routings]),
            "dropped": torch.stack([stats.dropped(r) for r in routings]),
            "tokens": torch.stack([stats.tokens(r) for r in routings]),
            "bad_tokens": torch.stack([stats.bad_tokens(r) for r in routings]),
        }
        if scores:
            entropy, confidence = zip(*(stats.scores(r) for r in routings), strict=True)
            found |= {"entropy": torch.stack(entropy), "confidence": torch.stack(confidence)}
        return found


def imbalance_of(load: Int[Tensor, "L E"], num_experts: Sequence[int]) -> Float[Tensor, "L"]:
    """Largest over mean load of each layer, 0 where nothing was chosen.

    Layers with fewer experts than the widest have columns that stay 0 and stand for no expert: `num_experts` says how
    many each has.
    """
    total = load.sum(-1)
    if not load.numel():
        return total.float()
    return load.amax(-1) / total.clamp(min=1) * torch.tensor(num_experts, device=load.device)


def _stack(loads: list[Tensor]) -> Tensor:
    """[L, E], filled up with zeros where layers have fewer experts."""
    width = max(len(load) for load in loads)
    return torch.stack([F.pad(load, (0, width - len(load))) for load in loads])
