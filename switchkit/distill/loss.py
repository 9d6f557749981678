"""What a student learns from: its targets, and a teacher's distribution, hidden states and attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from switchkit.metrics import cross_entropy

__all__ = [
    "Distilled",
    "TopK",
    "distillation_loss",
    "divergence",
    "hidden_loss",
    "mean_over",
    "real",
    "relation_loss",
    "top_k_divergence",
]


@dataclass(frozen=True)
class Distilled:
    """The distillation loss and its two parts, means over the same real tokens."""

    loss: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]
    divergence: Float[Tensor, ""]
    """KL from the student to the teacher in nats, both at the temperature, not yet multiplied by anything."""


@dataclass(frozen=True)
class TopK:
    """A teacher's distribution at some temperature: its K likeliest symbols, and what is left for all others."""

    log_probs: Float[Tensor, "B S K"]
    ids: Int[Tensor, "B S K"]
    log_rest: Float[Tensor, "B S"]
    """Log of the mass of all other symbols; -inf where there are none (K = V)."""


def distillation_loss(
    logits: Float[Tensor, "B S V"],
    teacher: Float[Tensor, "B S V"] | TopK,
    targets: Int[Tensor, "B S"],
    valid: Bool[Tensor, "B S"] | None = None,
    *,
    alpha: float = 0.25,
    temperature: float = 1.0,
) -> Distilled:
    """``(1 - alpha) CE(targets) + alpha T^2 KL(teacher || student)``, both at temperature T in the divergence.

    T^2 keeps the gradient of the second part of the same size whatever T is. Both parts are means over the real targets
    (`valid`, and not -100), computed in float32.

    Args:
        logits: the student's.
        teacher: the teacher's logits, or what was kept of them at this temperature.
        targets: the labels; those of -100 count in neither part.
        valid: True for real targets; null: all.
        alpha: share of the teacher's part; 0.25 is the paper's.
        temperature: T; the paper mentions none.

    Source: Hinton et al., arXiv 1503.02531, section 2; the mixture of 0.75 and 0.25: arXiv 2101.03961, Table 6.
    """
    total, tokens = cross_entropy(logits, targets, valid)
    entropy = total / tokens.clamp(min=1)
    each = (
        top_k_divergence(logits, teacher, temperature)
        if isinstance(teacher, TopK)
        else divergence(logits, teacher, temperature)
    )
    kl = mean_over(each, real(targets, valid))
    return Distilled((1 - alpha) * entropy + alpha * temperature**2 * kl, entropy, kl)


def divergence(
    logits: Float[Tensor, "B S V"], teacher: Float[Tensor, "B S V"], temperature: float = 1.0
) -> Float[Tensor, "B S"]:
    """``KL(softmax(teacher / T) || softmax(logits / T))`` of every token, in nats and in float32."""
    ours, theirs = (torch.log_softmax(x.float() / temperature, -1) for x in (logits, teacher))
    each = F.kl_div(ours, theirs, reduction="none", log_target=True)
    # A symbol that the teacher rules out adds nothing, and log 0 makes it 0 * inf.
    return each.masked_fill(theirs.isneginf(), 0).sum(-1)


def top_k_divergence(logits: Float[Tensor, "B S V"], teacher: TopK, temperature: float = 1.0) -> Float[Tensor, "B S"]:
    """The divergence over K + 1 outcomes: each of the teacher's K symbols, and any other one.

    It is the whole divergence where K = V, and never more than it otherwise: how the rest is shared out among its
    symbols counts as agreed. The teacher's masses are made to add up to 1, which rounding may have changed.
    """
    ours = torch.log_softmax(logits.float() / temperature, -1)
    kept, rest = teacher.log_probs.float(), teacher.log_rest.float()
    if teacher.ids.shape[-1] < ours.shape[-1]:
        # Of the symbols left out themselves: one less the sum of the others would cancel where little is left.
        others = ours.scatter(-1, teacher.ids, -torch.inf).logsumexp(-1, keepdim=True)
        ours = torch.cat([ours.gather(-1, teacher.ids), others], -1)
        kept = torch.cat([kept, rest.unsqueeze(-1)], -1)
    else:
        ours = ours.gather(-1, teacher.ids)
    kept = torch.log_softmax(kept, -1)
    # An outcome that the teacher rules out adds nothing, and log 0 would make it 0 * inf.
    return torch.where(kept.isneginf(), 0.0, kept.exp() * (kept.masked_fill(kept.isneginf(), 0) - ours)).sum(-1)


def hidden_loss(
    student: Float[Tensor, "B S D"], teacher: Float[Tensor, "B S E"], counted: Bool[Tensor, "B S"] | None
) -> Float[Tensor, ""]:
    """Mean squared error over the tokens that count (null: all) and the width.

    Source: Jiao et al., arXiv 1909.10351 (TinyBERT), equation 8.
    """
    squares = (student.float() - teacher.float()).square().mean(-1)
    return squares.mean() if counted is None else mean_over(squares, counted)


def relation_loss(
    student: Float[Tensor, "B S D"],
    teacher: Float[Tensor, "B S E"],
    heads: int,
    valid: Bool[Tensor, "B S"] | None,
    *,
    causal: bool,
    counted: Bool[Tensor, "B S"] | None = None,
) -> Float[Tensor, ""]:
    """``KL(teacher's relation || student's)``, mean over heads and tokens, where both models may have other heads.

    The relation of a kind of vectors (queries, keys or values) is ``softmax(X X^T / sqrt(width))``: all heads side by
    side are cut anew into `heads` of them. A token relates to what attention lets it see, `valid` ones alone; the mean
    is over those that are `counted`, null: the valid ones.

    Source: Wang et al., arXiv 2012.15828 (MiniLMv2), equations 1 to 4; of values alone: arXiv 2002.10957.
    """
    size = student.shape[1]
    see = torch.ones(1, size, size, dtype=torch.bool, device=student.device)
    see = see.tril() if causal else see
    if valid is not None:
        # Padding relates to itself, so that its row stays finite; it is not counted.
        see = see & (valid.unsqueeze(1) | torch.eye(size, dtype=torch.bool, device=see.device))
    see = see.unsqueeze(1)
    ours, theirs = (_relation(x, heads, see) for x in (student, teacher))
    each = (theirs.exp() * (theirs - ours)).masked_fill(~see, 0).sum(-1).mean(1)
    counted = valid if counted is None else counted
    return each.mean() if counted is None else mean_over(each, counted)


def real(targets: Int[Tensor, "B S"], valid: Bool[Tensor, "B S"] | None) -> Bool[Tensor, "B S"]:
    """Which targets count."""
    return targets != -100 if valid is None else valid & (targets != -100)


def mean_over(values: Float[Tensor, "B S"], counted: Bool[Tensor, "B S"]) -> Float[Tensor, ""]:
    """The mean of the counted ones; 0 where there is none."""
    return values.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)


def _relation(x: Tensor, heads: int, see: Tensor) -> Float[Tensor, "B R S S"]:
    """Log-probabilities, in float32."""
    x = x.float().view(*x.shape[:2], heads, -1).transpose(1, 2)
    scores = x @ x.transpose(-1, -2) * x.shape[-1] ** -0.5
    return scores.masked_fill(~see, torch.finfo(scores.dtype).min).log_softmax(-1)
