"""All new tokens at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from switchkit.generation.beams import search
from switchkit.generation.ends import ends_of, is_end
from switchkit.generation.steps import steps
from switchkit.generation.window import Window

__all__ = ["Generated", "check_beams", "generate"]


@dataclass(frozen=True)
class Generated:
    """What `generate` returns; N is the length of the longest row."""

    tokens: Int[Tensor, "B N"]
    """The new tokens alone; behind the end of a row (the first) `eos_id` again."""
    valid: Bool[Tensor, "B N"]
    """True: a token of the row, the `eos_id` that ends it included."""
    log_prob: Float[Tensor, "B"]
    """Of the row under the model, whatever it was taken by: without temperature, cuts and length penalty."""


def generate(
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
    num_beams: int = 1,
    length_penalty: float = 0.6,
    eos_id: int | Sequence[int] | None = None,
    use_cache: bool = True,
    symbols: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Generated:
    """All new tokens of every row. What is not named here is as in `stream`.

    Args:
        num_beams: above 1 nothing is drawn: beam search keeps that many beginnings of each row, and gives the sequence
            of the highest score that it found, log-probability over length penalty. The search of a row is over when
            no beginning can come to more than the best sequence that has ended, so that stopping then loses nothing.
        length_penalty: alpha of GNMT's penalty ((5 + length) / 6) ** alpha, `eos_id` counted; 0: none. T5 decodes with
            0.6.

    Raises:
        ValueError: as `stream`; fewer than one beam, a penalty below 0, beam search with options of drawing.

    Source: arXiv 1609.08144, eq. 14 (without its term of coverage).
    """
    check_beams(num_beams, length_penalty, temperature, top_k, top_p)
    given = {"source": source, "source_valid": source_valid}
    window = Window(net, tokens, valid, **given, use_cache=use_cache, symbols=symbols)
    ends = ends_of(eos_id)
    columns = steps(window, max_new_tokens, temperature, top_k, top_p, ends, generator)
    with torch.no_grad():
        if num_beams > 1:
            return _gathered(*search(window, num_beams, max_new_tokens, length_penalty, ends), ends)
        return _joined(columns, window, ends)


def _gathered(rows: list[Tensor], log_prob: Tensor, ends: tuple[int, ...]) -> Generated:
    lengths = torch.tensor([len(row) for row in rows], device=log_prob.device)
    tokens = pad_sequence(rows, batch_first=True, padding_value=ends[0] if ends else 0)
    return Generated(tokens, torch.arange(tokens.shape[1], device=tokens.device) < lengths.unsqueeze(1), log_prob)


def _joined(columns: Iterator[tuple[Tensor, Tensor]], window: Window, ends: tuple[int, ...]) -> Generated:
    found, log_probs = [window.tokens[:, :0]], [torch.zeros(window.rows, 0, device=window.tokens.device)]
    for token, logits in columns:
        found.append(token.unsqueeze(1))
        log_probs.append(logits.log_softmax(-1).gather(1, found[-1]))
    tokens = torch.cat(found, dim=1)
    # The first end of a row is its own; what follows is filling.
    over = is_end(tokens, ends).cumsum(1) > 1
    return Generated(tokens, ~over, torch.cat(log_probs, dim=1).masked_fill(over, 0).sum(1))


def check_beams(
    num_beams: int, length_penalty: float, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """Raise where the options of beam search do not fit.

    Raises:
        ValueError: fewer than one beam, a penalty below 0 or not finite, beam search with options of drawing.
    """
    if num_beams < 1:
        raise ValueError(f"num_beams must be at least 1 (1: no search); got {num_beams}")
    if not 0 <= length_penalty < math.inf:
        raise ValueError(f"length_penalty must be a finite number >= 0 (0: none); got {length_penalty}")
    if num_beams > 1 and (temperature not in (0, 1) or top_k is not None or top_p is not None):
        raise ValueError(
            f"num_beams={num_beams} searches and draws nothing: leave out temperature, top_k and top_p, or num_beams"
        )
