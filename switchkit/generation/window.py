"""What a model goes on from: the tokens so far, and what is cached of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from switchkit.layers import moe_layers
from switchkit.models.base import Cache, evaluating

__all__ = ["Window", "pad_left"]


class Window:
    """The tokens of several sequences that a model goes on from, in step with each other.

    With a cache a step computes the newest token alone. Where `net.uncacheable` says why that would differ from a
    forward of the whole (a capacity binds, a router decides by position), or the model keeps no cache, each step is a
    full forward. Where the model's `context` is full, the older half of the sequence is forgotten and the cache made
    anew from the newer half, so that a token costs about the same all the way; without a cache the same is forgotten.

    Rows that would share the capacity of experts (`group` "batch" or a number of tokens), be it in an encoder alone,
    are computed one after another and without a cache: each is what it is alone, beams of one text included.

    Args:
        net: a `Decoder`, an `EncoderDecoder`, or a model that is called as one of them.
        tokens: the prompts, padded on the left; of an encoder-decoder what its output begins with (default: its
            start id). Of a prompt longer than the context, the newest part.
        valid: True for real tokens; None: all of them.
        source: what an encoder-decoder reads.
        source_valid: True for real tokens of the source; None: all of them.
        use_cache: False computes the whole sequence at each step.
        symbols: how many ids may come next, from 0 on; None: all that the model has. Published models have more than
            their tokenizers.

    Raises:
        ValueError: no prompt, a row without a token, no source where the model reads one, or one where it does not.
    """

    def __init__(
        self,
        net: nn.Module,
        tokens: Int[Tensor, "B S"] | None,
        valid: Bool[Tensor, "B S"] | None = None,
        *,
        source: Int[Tensor, "B T"] | None = None,
        source_valid: Bool[Tensor, "B T"] | None = None,
        use_cache: bool = True,
        symbols: int | None = None,
    ) -> None:
        start = getattr(net, "start_id", None)
        kind = type(net).__name__
        if (source is None) != (start is None):
            what = "goes on from tokens and reads no source" if start is None else "reads a source, and none was given"
            raise ValueError(f"a {kind} {what}")
        if source is not None and tokens is None:
            tokens = torch.full_like(source[:, :1], int(start))  # type: ignore[arg-type]
        for name, given, real in (("prompt", tokens, valid), ("source", source, source_valid)):
            _check(name, given, real)
        assert tokens is not None
        self.net, self.source, self.source_valid, self.symbols = net, source, source_valid, symbols
        self._parts = list(net.modules())  # gone through at every step
        context = getattr(net, "context", None)
        self.context = None if context is None else int(context)
        self.tokens = tokens[:, -self.context :] if self.context else tokens
        self.valid = None if valid is None else valid[:, -self.tokens.shape[1] :]
        # Whether what becomes of a row depends on the others of its batch.
        together = (layer for layer in moe_layers(net).values() if layer.group != "sequence")
        meet = any(layer.uncacheable is not None for layer in together)
        self.caches = use_cache and getattr(net, "uncacheable", "it keeps no cache") is None
        # A cache is filled for all rows at once, which would then share an encoder's experts.
        self.caches = self.caches and not (meet and len(self.tokens) > 1)
        self.cache: Cache | None = None
        self.cached = 0  # tokens that the cache holds
        self.apart = not self.caches and meet

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    def logits(self) -> Float[Tensor, "B V"]:
        """Of the next token of each row, in float32 at least."""
        if self.context is not None and self.tokens.shape[1] > self.context:
            self._keep(max(1, self.context // 2))
        tokens = self.tokens[:, self.cached :]
        given: dict[str, Tensor | None] = {}
        if self.source is not None and self.cache is None:
            given |= {"source": self.source, "source_valid": self.source_valid}
        if self.valid is not None:
            given["valid"] = self.valid[:, self.cached :]
        with torch.inference_mode(), evaluating(self.net, self._parts):
            if self.apart:
                last = torch.cat([self._last(*_row(tokens, given, index)) for index in range(self.rows)])
            else:
                last = self._last(tokens, given)
        return last.to(torch.promote_types(last.dtype, torch.float32))

    def append(self, tokens: Int[Tensor, "B"]) -> None:
        """One more token of each row."""
        self.tokens = torch.cat([self.tokens, tokens.unsqueeze(1)], dim=1)
        if self.valid is not None:
            self.valid = torch.cat([self.valid, self.valid.new_ones(self.rows, 1)], dim=1)

    def select(self, index: Int[Tensor, "N"]) -> None:
        """Go on with these rows, in this order, some of them more than once."""
        self.tokens = self.tokens[index]
        for name in ("valid", "source", "source_valid"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[index])
        if self.cache is not None:
            self.cache = self.cache.select(index)

    def _last(self, tokens: Int[Tensor, "B S"], given: dict[str, Tensor | None]) -> Float[Tensor, "B V"]:
        """Logits at the last place; what is cached grows by these tokens."""
        if not self.caches:
            return self.net(tokens, **given).logits[:, -1, : self.symbols]
        out = self.net(tokens, **given, cache=Cache() if self.cache is None else self.cache)
        self.cache, self.cached = out.cache, self.tokens.shape[1]
        return out.logits[:, -1, : self.symbols]

    def _keep(self, newest: int) -> None:
        self.tokens = self.tokens[:, -newest:]
        self.valid = None if self.valid is None else self.valid[:, -newest:]
        self.cache, self.cached = None, 0


def pad_left(prompts: Sequence[Int[Tensor, "_"]], pad_id: int = 0) -> tuple[Int[Tensor, "B S"], Bool[Tensor, "B S"]]:
    """Prompts of different lengths as one batch, and which of its tokens are real.

    Raises:
        ValueError: no prompt, or an empty one.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("the prompt is empty: give at least one prompt, and a token in each")
    size = max(len(prompt) for prompt in prompts)
    rows = [torch.cat([prompt.new_full((size - len(prompt),), pad_id), prompt]) for prompt in prompts]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=prompts[0].device)
    return torch.stack(rows), torch.arange(size, device=lengths.device) >= size - lengths.unsqueeze(1)


def _row(tokens: Tensor, given: dict[str, Tensor | None], index: int) -> tuple[Tensor, dict[str, Tensor | None]]:
    """One row alone, as a batch."""
    one = slice(index, index + 1)
    return tokens[one], {name: None if value is None else value[one] for name, value in given.items()}


def _check(name: str, tokens: Tensor | None, valid: Tensor | None) -> None:
    if tokens is None:
        if name == "prompt":
            raise ValueError("there is no prompt: give the tokens to go on from")
        return
    if tokens.numel() == 0:
        raise ValueError(f"the {name} is empty: give at least one token to go on from")
    if valid is None:
        return
    if valid.shape != tokens.shape:
        raise ValueError(f"the {name} has shape {list(tokens.shape)} and its valid {list(valid.shape)}: give one each")
    if not bool(valid.any(1).all()):
        row = int((~valid.any(1)).nonzero()[0])
        raise ValueError(f"row {row} of the {name} is empty: give at least one token to go on from")
    if name == "prompt" and not bool(valid[:, -1].all()):
        row = int((~valid[:, -1]).nonzero()[0])
        raise ValueError(f"row {row} of the prompt ends in padding: pad on the left (switchkit.generation.pad_left)")
