"""Drawing the next token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["sample"]


def sample(
    temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None, logits: Tensor
) -> Tensor:
    """One token id from logits [V]; the cuts apply after the temperature, top_k first."""
    if temperature == 0:
        return logits.argmax()
    ranked, order = (logits / temperature).sort(descending=True)
    if top_k is not None:
        ranked[top_k:] = -math.inf
    probs = ranked.softmax(-1)
    if top_p is not None:
        # A token stays while those before it have not reached top_p, so the first always stays.
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)
    draw = torch.multinomial(probs.cpu(), 1, generator=generator)
    return order[draw.to(order.device)].squeeze()
