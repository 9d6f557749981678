"""One sequence, as ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn

from switchkit.generation.beams import search
from switchkit.generation.complete import check_beams
from switchkit.generation.ends import ends_of
from switchkit.generation.steps import check_count, stream
from switchkit.generation.window import Window

__all__ = ["continuation"]


def continuation(
    net: nn.Module,
    ids: Int[Tensor, "S"],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    length_penalty: float = 0.6,
    eos_id: int | Sequence[int] | None = None,
    use_cache: bool = True,
    symbols: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """New token ids one by one as they come, or with beams when the search is over; what ends them is left out.

    `ids` is the prompt, and what an encoder-decoder reads. The options are those of `stream` and `generate`.

    Raises:
        ValueError: an empty prompt, an option out of range; at once, not with the first token.
    """
    check_beams(num_beams, length_penalty, temperature, top_k, top_p)
    check_count(max_new_tokens)
    if ids.numel() == 0:
        raise ValueError("the prompt is empty: give at least one token to go on from")
    row, count, ends = ids.view(1, -1), max_new_tokens, ends_of(eos_id)
    source = row if hasattr(net, "start_id") else None
    tokens = row if source is None else None
    if num_beams > 1:
        found = Window(net, tokens, source=source, use_cache=use_cache, symbols=symbols)
        return _searched(found, num_beams, count, length_penalty, ends)
    drawn = stream(
        net,
        tokens,
        source=source,
        max_new_tokens=count,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_id=ends,
        use_cache=use_cache,
        symbols=symbols,
        generator=generator,
    )
    return (token for token in map(int, drawn) if token not in ends)


def _searched(window: Window, beams: int, count: int, alpha: float, ends: tuple[int, ...]) -> Iterator[int]:
    rows, _ = search(window, beams, count, alpha, ends)
    yield from (token for token in rows[0].tolist() if token not in ends)
