"""Experts in groups: a token may choose from a few of them only."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["check_groups", "limit_to_groups"]


def limit_to_groups(scores: Float[Tensor, "G S E"], groups: int, top_groups: int, best: int) -> Float[Tensor, "G S E"]:
    """The scores with -inf for the experts outside the best `top_groups` of `groups` equal groups of neighbours.

    A group counts as much as its `best` largest scores together (all of them where it has fewer): 1 is the maximum
    (arXiv 2405.04434, section 2.2.2), 2 is that of arXiv 2412.19437 (section 2.1.2). Adding a constant to all scores
    changes no choice, whatever their sign.

    Elsewhere: litgpt fills with 0 in place of -inf, so that an expert outside the groups wins as soon as a negative
    bias takes those inside below 0.
    """
    # The size is said: of no tokens it cannot be told.
    parts = scores.view(*scores.shape[:-1], groups, scores.shape[-1] // groups)
    total = parts.topk(min(best, parts.shape[-1]), dim=-1).values.sum(-1)
    inside = torch.zeros_like(total, dtype=torch.bool).scatter(-1, total.topk(top_groups, dim=-1).indices, True)
    return parts.masked_fill(~inside.unsqueeze(-1), float("-inf")).flatten(-2)


def check_groups(groups: int, top_groups: int | None, *, k: int, num_experts: int) -> int:
    """`top_groups`, or a ValueError that says which groups would do."""
    if groups < 1 or num_experts % groups:
        raise ValueError(f"groups={groups} must divide num_experts={num_experts}: choose a divisor, 1 for no groups")
    if top_groups is None:
        if groups > 1:
            raise ValueError(f"groups={groups} needs top_groups, the groups that a token chooses from: 1 ... {groups}")
        return 1
    if not 1 <= top_groups <= groups:
        raise ValueError(f"top_groups must be from 1 to groups={groups}; got {top_groups}")
    left = num_experts // groups * top_groups
    if k > left:
        raise ValueError(
            f"k={k} choices do not fit into the {left} experts of top_groups={top_groups}: lower k or raise top_groups"
        )
    return top_groups
