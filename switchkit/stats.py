"""What a routing record says about itself: pure functions, differentiable where that makes sense."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from switchkit.records import Routing, asked_expert, experts_of, kept_ones, load, spans

__all__ = [
    "bad_tokens",
    "dropped",
    "experts_of",
    "imbalance",
    "is_dropped",
    "joint_counts",
    "load",
    "position",
    "scores",
    "sequence_length",
    "tokens",
]


def dropped(routing: Routing) -> Int[Tensor, ""]:
    """Chosen assignments that did not fit."""
    return routing.chosen.sum() - kept_ones(routing).sum()


def is_dropped(routing: Routing) -> Bool[Tensor, "G N"]:
    """Which assignments were chosen and did not fit."""
    return routing.chosen & ~kept_ones(routing)


def imbalance(routing: Routing) -> Float[Tensor, ""]:
    """Largest load over mean load: 1 when even, E when one expert gets everything, 0 when nothing was chosen."""
    counts = load(routing)
    return counts.max() * len(counts) / counts.sum().clamp(min=1)


def bad_tokens(routing: Routing) -> Int[Tensor, ""]:
    """Real tokens that the router could not score, for it saw NaN or infinity; -inf closes an expert to a token."""
    # The largest logit is NaN where any is, and -inf where all experts are closed.
    return (~torch.isfinite(routing.logits.amax(-1)) & routing.valid).sum()


def tokens(routing: Routing) -> Int[Tensor, ""]:
    """Real tokens."""
    return routing.valid.sum()


def scores(routing: Routing) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Sums over the real tokens of the entropy of their probabilities, in nats, and of the largest one.

    Probabilities that do not add up to 1, as those of independent gates, are divided by their sum first; a token
    without any counts 0 in both.
    """
    total = routing.probs.sum(-1)
    floor = torch.finfo(total.dtype).tiny
    real, divisor = routing.valid & (total > 0), total.clamp(min=floor)
    # H(p / z) = log z - (sum p log p) / z. `log` runs over all entries at twice the speed of `torch.special.entr`.
    entropy = divisor.log() - (routing.probs * routing.probs.clamp(min=floor).log()).sum(-1) / divisor
    largest = routing.probs.amax(-1) / divisor
    return entropy.masked_fill(~real, 0).sum(), largest.masked_fill(~real, 0).sum()


def sequence_length(routing: Routing) -> int:
    """Tokens of a sequence, padding counted.

    Raises:
        ValueError: a record that no layer has filled in, of groups that are neither a sequence each nor the batch.
    """
    return spans(routing, "sequence")[1]


def position(routing: Routing, length: int) -> Int[Tensor, "G S"]:
    """Place of each token in its sequence of `length` tokens, from 0, padding counted."""
    return torch.arange(routing.valid.numel(), device=routing.valid.device).view(routing.valid.shape) % length


def joint_counts(routing: Routing, labels: Int[Tensor, "B S"], num_labels: int) -> Int[Tensor, "E Z"]:
    """Assignments by the expert that the router chose and the label (Z of them) of their token, if not negative."""
    groups, size, experts = routing.logits.shape
    # A ragged last group is longer than the batch: what lies past it was never chosen.
    flat = labels.flatten()
    flat = torch.cat([flat, flat.new_full((groups * size - flat.numel(),), -1)])
    label = flat.view(groups, size).gather(1, routing.token)
    counted = (routing.chosen & (label >= 0)).long()
    found = torch.zeros(experts, num_labels, dtype=torch.long, device=labels.device)
    # By two indices, so that a label out of range is an error and not another expert's.
    return found.index_put_((asked_expert(routing), label.clamp(min=0)), counted, accumulate=True)
