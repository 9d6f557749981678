"""Several sequences of different lengths at once, as ids, where each comes out as it would alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from switchkit.generation.complete import generate
from switchkit.generation.ends import ends_of
from switchkit.generation.window import pad_left
from switchkit.models.base import uncacheable

__all__ = ["completions", "one_at_a_time"]


def one_at_a_time(net: nn.Module, prompts: Sequence[Int[Tensor, "_"]], max_new_tokens: int) -> str | None:
    """Why these sequences must not share a batch, for their texts would be others; None: they may.

    Padding must not count: a capacity in evaluation is a share of the padded length, and some routers decide by place
    or on several tokens. And where the `context` becomes full, all rows of a batch forget their older half at once.
    """
    if not hasattr(net, "uncacheable"):
        return f"a {type(net).__name__} does not say whether padding changes what it computes (uncacheable)"
    why = net.uncacheable or uncacheable(net)
    if why is not None:
        return str(why)
    context, lengths = getattr(net, "context", None), {len(prompt) for prompt in prompts}
    if hasattr(net, "start_id") or context is None or len(lengths) == 1:
        return None
    longest = max(lengths) + max_new_tokens - 1
    if longest > context:
        return f"the longest prompt with its new tokens ({longest}) does not fit into the context of {context}"
    return None


def completions(
    net: nn.Module,
    prompts: Sequence[Int[Tensor, "_"]],
    max_new_tokens: int,
    *,
    eos_id: int | Sequence[int] | None = None,
    **options: Any,
) -> list[list[int]]:
    """The new ids of every prompt, what ends them left out. The options are those of `generate`.

    Each is what `continuation` gives for the prompt alone, but for rounding, unless `one_at_a_time` says why not; drawn
    with a generator for each row. A prompt is what an encoder-decoder reads.

    Raises:
        ValueError: as `generate`; an empty prompt.
    """
    ends = ends_of(eos_id)
    tokens, valid = pad_left(prompts)
    given: dict[str, Any]
    if hasattr(net, "start_id"):
        # Behind a source padding is as good, and it is what models were trained with.
        sizes = valid.sum(1, keepdim=True)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        order = (places + tokens.shape[1] - sizes) % tokens.shape[1]
        given = {"source": tokens.gather(1, order), "source_valid": places < sizes}
    else:
        given = {"tokens": tokens, "valid": valid}
    found = generate(net, **given, max_new_tokens=max_new_tokens, eos_id=ends, **options)
    return [
        [token for token, real in zip(row, kept, strict=True) if real and token not in ends]
        for row, kept in zip(found.tokens.tolist(), found.valid.tolist(), strict=True)
    ]
