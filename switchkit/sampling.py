"""Drawing the next token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from switchkit.checks import at_least

__all__ = ["check_sampling", "probabilities", "sample"]


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise where one of the options is out of range.

    Raises:
        ValueError: a temperature below 0 or not finite, top_k below 1, top_p outside (0, 1].
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number >= 0 (0: the likeliest token); got {temperature}")
    if top_k is not None:
        at_least(1, top_k=top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1]; got {top_p}")


def probabilities(
    logits: Float[Tensor, "*rows V"], temperature: float, top_k: int | None, top_p: float | None
) -> Float[Tensor, "*rows V"]:
    """What `sample` draws from: the cuts apply after the temperature (above 0), top_k first.

    Source: top_p is nucleus sampling, arXiv 1904.09751.
    """
    # The largest at 0, so that a small temperature makes it neither infinite nor, where it rounds to 0, NaN.
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is None and top_p in (None, 1):
        return scaled.softmax(-1)
    ranked, order = scaled.sort(descending=True, stable=True)
    if top_k is not None:
        ranked[..., top_k:] = -math.inf
    probs = ranked.softmax(-1)
    if top_p is not None and top_p < 1:
        # A token stays while those before it have not reached top_p, so the first always stays. In float64: sums over
        # a large vocabulary reach it early in float32.
        exact = ranked.double().softmax(-1)
        probs = probs.masked_fill(exact.cumsum(-1) - exact >= top_p, 0)
        probs = probs / probs.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, order, probs)


def sample(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    logits: Float[Tensor, "*rows V"],
) -> Int[Tensor, "*rows"]:
    """One token id per row, drawn on the generator's device (the CPU without one), the rows in order.

    With a generator for each row, a row's draws are those that it would have alone.

    Temperature 0 takes the likeliest and draws nothing.
    """
    if temperature == 0:
        return logits.argmax(-1)
    several = None if generator is None or isinstance(generator, torch.Generator) else list(generator)
    one = several[0] if several else generator
    assert one is None or isinstance(one, torch.Generator)
    probs = probabilities(logits, temperature, top_k, top_p).to("cpu" if one is None else one.device)
    # The token whose exponential clock rings first is drawn with its probability. Clocks belong to tokens and not to
    # ranks, so that logits which differ by rounding give the same token.
    if several is None:
        clocks = torch.empty_like(probs).exponential_(generator=one)
    else:
        clocks = torch.stack(
            [torch.empty_like(row).exponential_(generator=own) for row, own in zip(probs, several, strict=True)]
        )
    return (probs / clocks.clamp_min(torch.finfo(probs.dtype).tiny)).argmax(-1).to(logits.device)
