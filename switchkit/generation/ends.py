"""The tokens that end a text: one, several, or none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["ends_of", "is_end"]


def ends_of(eos_id: int | Sequence[int] | None) -> tuple[int, ...]:
    """All of them; empty: nothing ends a text."""
    if eos_id is None:
        return ()
    return (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)


def is_end(tokens: Int[Tensor, "..."], ends: Sequence[int]) -> Bool[Tensor, "..."]:
    """True where a token is one of `ends`."""
    found = torch.zeros_like(tokens, dtype=torch.bool)
    for end in ends:
        found = found | (tokens == end)
    return found
