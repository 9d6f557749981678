"""One token of each row at a time: the likeliest, or a random draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from switchkit.checks import at_least
from switchkit.generation.ends import ends_of, is_end
from switchkit.generation.window import Window
from switchkit.sampling import check_sampling, sample

__all__ = ["check_count", "steps", "stream"]


def stream(
    net: nn.Module,
    tokens: Int[Tensor, "B S"] | None = None,
    valid: Bool[Tensor, "B S"] | None = None,
    *,
    max_new_tokens: int,
    source: Int[Tensor, "B T"] | None = None,
    source_valid: Bool[Tensor, "B T"] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | Sequence[int] | None = None,
    use_cache: bool = True,
    symbols: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Iterator[Int[Tensor, "B"]]:
    """Yield the next token of every row, step by step, until all rows have ended.

    The model is in evaluation mode while a token is computed, and as it was in between; there is no gradient. With a
    cache each step computes the newest token alone. Where `net.uncacheable` says why that would differ from a forward
    of the whole (a capacity binds, a router decides by position), or the model keeps no cache, each step is a full
    forward, row by row where rows would share the capacity of experts. Where the model's `context` is full, the older
    half of the sequence is forgotten and the cache made anew from the newer half, so that a token costs about the same
    all the way; in a batch the longest row decides when.

    Args:
        net: a `Decoder`, an `EncoderDecoder`, or a model that is called as one of them.
        tokens: the prompts, padded on the left (`pad_left`); of an encoder-decoder what its output begins with
            (default: its start id).
        valid: True for the tokens of the prompts; None: all of them.
        max_new_tokens: steps at most.
        source: what an encoder-decoder reads.
        source_valid: True for real tokens of the source; None: all of them.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the likeliest tokens that hold this probability together.
        eos_id: a row ends with this token, or any of several, and gives the first of them from then on; None, or an
            empty row: no row ends early.
        use_cache: False computes the whole sequence at each step: slower, and the same tokens.
        symbols: how many ids may come next, from 0 on; None: all that the model has. Published models have more than
            their tokenizers.
        generator: of the draws, one per row and step in order, rows that have ended included: a seed gives the same
            text with a cache and without. One for each row: a row's text does not depend on the others.

    Raises:
        ValueError: no prompt, an empty row, a source that the model does not read, an option out of range, generators
            that are not one for each row.
    """
    given = {"source": source, "source_valid": source_valid}
    window = Window(net, tokens, valid, **given, use_cache=use_cache, symbols=symbols)
    found = steps(window, max_new_tokens, temperature, top_k, top_p, eos_id, generator)
    return (token for token, _ in found)


def steps(
    window: Window,
    count: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos_id: int | Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Iterator[tuple[Int[Tensor, "B"], Float[Tensor, "B V"]]]:
    """The token of each row and the logits that it was taken from (zeros for a row that has ended).

    Raises:
        ValueError: an option out of range, generators that are not one for each row; at once, not with the first token.
    """
    check_sampling(temperature, top_k, top_p)
    check_count(count)
    if isinstance(generator, Sequence) and len(generator) != window.rows:
        raise ValueError(
            f"generator must be one, or a list with one for each of {window.rows} rows; got a list of {len(generator)}"
        )
    return _steps(window, count, temperature, top_k, top_p, ends_of(eos_id), generator)


def check_count(count: int) -> None:
    """A ValueError for fewer than no tokens."""
    at_least(0, max_new_tokens=count)


def _steps(
    window: Window,
    count: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    ends: tuple[int, ...],
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    going = torch.arange(window.rows, device=window.tokens.device)
    ended = torch.zeros(window.rows, dtype=torch.bool, device=going.device)
    for step in range(count):
        logits = window.logits()
        if len(going) < len(ended):
            # Rows that have ended draw on, so that the draws of a row do not depend on what others came to say.
            logits = logits.new_zeros(len(ended), logits.shape[-1]).index_copy(0, going, logits)
        token = sample(temperature, top_k, top_p, generator, logits)
        if ends:
            token = token.masked_fill(ended, ends[0])
            ended = ended | is_end(token, ends)
        yield token, logits
        if ends and bool(ended[going].any()):
            window.select((~ended[going]).nonzero().squeeze(1))
            going = (~ended).nonzero().squeeze(1)
            if not len(going):
                return
        if step < count - 1:
            window.append(token[going])
