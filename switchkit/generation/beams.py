"""Beam search."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from switchkit.generation.ends import ends_of, is_end
from switchkit.generation.window import Window

__all__ = ["penalty", "search"]


def penalty(length: int, alpha: float) -> float:
    """What a log-probability is divided by: ((5 + length) / 6) ** alpha. Source: arXiv 1609.08144, eq. 14."""
    return ((5 + length) / 6) ** alpha


def search(
    window: Window, beams: int, count: int, alpha: float, eos_id: int | Sequence[int] | None
) -> tuple[list[Int[Tensor, "_"]], Float[Tensor, "B"]]:
    """The best sequence found for each row, its `eos_id` included, and its log-probability.

    At each step every beginning goes on with every token. Of all these, those that end among the `beams` best are
    candidates, and the `beams` best that do not end are the next beginnings. A row is done when no beginning can score
    above its best candidate any more: log-probabilities only fall, and no divisor is larger than that of `count`.
    """
    stops = ends_of(eos_id)
    # So many of all continuations that `beams` do not end, whatever ends a text.
    wide = (1 + max(len(stops), 1)) * beams
    rows, device = window.rows, window.tokens.device
    found: list[Tensor] = [torch.empty(0, dtype=torch.long, device=device) for _ in range(rows)]
    best, log_prob = torch.full((rows,), -math.inf, device=device), torch.zeros(rows, device=device)
    going = torch.arange(rows, device=device)
    # Equal beginnings at first, of which one counts.
    score = torch.full((rows, beams), -math.inf, device=device)
    score[:, 0] = 0
    paths = torch.empty(rows, beams, 0, dtype=torch.long, device=device)
    for length in range(1, count + 1):
        logits = window.logits()
        if length == 1:
            first = torch.arange(rows, device=device).repeat_interleave(beams)
            window.select(first)
            logits = logits[first]
        symbols = logits.shape[-1]
        reached = score.unsqueeze(-1) + logits.log_softmax(-1).view(len(going), beams, symbols)
        value, place = reached.flatten(1).topk(min(wide, beams * symbols))
        parent, token = place // symbols, place % symbols
        ends = is_end(token, stops)
        if length == count:
            # What has not ended by now competes as it is.
            ends = torch.ones_like(ends)
        candidate = value[:, :beams].masked_fill(~ends[:, :beams], -math.inf)
        top, rank = candidate.max(-1)
        normalised = top / penalty(length, alpha)
        for place_in_batch in (normalised > best[going]).nonzero().squeeze(1).tolist():
            row, which = int(going[place_in_batch]), int(rank[place_in_batch])
            path = paths[place_in_batch, int(parent[place_in_batch, which])]
            found[row] = torch.cat([path, token[place_in_batch, which].view(1)])
            best[row], log_prob[row] = normalised[place_in_batch], top[place_in_batch]
        if length == count:
            break
        onward = ends.to(torch.uint8).argsort(dim=-1, stable=True)[:, :beams]
        value, parent, token = (x.gather(1, onward) for x in (value.masked_fill(ends, -math.inf), parent, token))
        open_ = (value[:, 0] / penalty(count, alpha) > best[going]).nonzero().squeeze(1)
        if not len(open_):
            break
        going, score, parent, token = going[open_], value[open_], parent[open_], token[open_]
        before = paths[open_].gather(1, parent.unsqueeze(-1).expand(-1, -1, length - 1))
        paths = torch.cat([before, token.unsqueeze(-1)], dim=-1)
        window.select((open_.unsqueeze(1) * beams + parent).flatten())
        window.append(token.flatten())
    return found, log_prob
