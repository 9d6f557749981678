"""What models share: their result, the cache of token-by-token decoding, and where sparse layers stand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from switchkit.blocks import Past
from switchkit.checks import at_least
from switchkit.layers import FeedForwardFactory, MoEFactory, MoELayer, moe_layers
from switchkit.records import Routing

__all__ = [
    "Cache",
    "NetFactory",
    "Output",
    "check_cache",
    "causal_layers",
    "dense_layer",
    "evaluating",
    "every",
    "last",
    "layer_widths",
    "leak",
    "own_options",
    "sparse_layers",
    "through",
    "uncacheable",
]


@dataclass(frozen=True)
class Cache:
    """What a model keeps of the tokens it has seen, so that the next call gives only those that follow.

    ``Cache()`` holds none: give it to a model to begin one, and take the filled one from the output.
    """

    layers: tuple[Past, ...] = ()
    valid: Bool[Tensor, "B P"] | None = None
    """Which of the P tokens are real; null: all."""
    memory_see: Bool[Tensor, "B 1 1 M"] | None = None
    """Which tokens of an encoder's input are real; null: all."""

    @property
    def length(self) -> int:
        """Tokens seen, P."""
        return self.layers[0].attention.length if self.layers else 0

    def select(self, index: Int[Tensor, "rows"]) -> Cache:
        """That of some rows of the batch, in that order: beams that live on, sequences that go on."""

        def rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.index_select(0, index)

        return Cache(tuple(past.select(index) for past in self.layers), rows(self.valid), rows(self.memory_see))

    def with_valid(self, valid: Bool[Tensor, "B S"] | None, batch: int, size: int) -> Bool[Tensor, "B K"] | None:
        """Which of the tokens seen and of `size` more are real; null: all."""
        if valid is None and self.valid is None:
            return None
        device = (self.valid if valid is None else valid).device  # type: ignore[union-attr]
        before = torch.ones(batch, self.length, dtype=torch.bool, device=device) if self.valid is None else self.valid
        now = torch.ones(batch, size, dtype=torch.bool, device=device) if valid is None else valid
        return torch.cat([before, now], 1)


@dataclass(frozen=True)
class Output:
    """What a model returns: logits [B, S, V], one record for each `MoELayer`, in the order of the model's
    `named_modules` (whatever order they are called in), and the cache if one was given."""

    logits: Float[Tensor, "B S V"]
    routings: tuple[Routing, ...]
    cache: Cache | None = None


class NetFactory(Protocol):
    """Anything that builds a model for a vocabulary: `Decoder`, a `functools.partial` of it, a YAML part.

    The model is called with `tokens` [B, S] and `valid` [B, S] or None, and returns an `Output` with one record for
    each of its `MoELayer`s, in the order of `named_modules`; an encoder-decoder also takes `source` and `source_valid`.
    """

    def __call__(self, *, vocab_size: int, moe: MoEFactory | None) -> nn.Module: ...


def every(n: int) -> str:
    """Placement: every n-th layer is sparse, the n-th first (1 makes all of them sparse)."""
    return f"every({n})"


def last(n: int) -> str:
    """Placement: the last n layers are sparse."""
    return f"last({n})"


def sparse_layers(placement: str | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Indices of the sparse layers, from "every(n)", "last(n)" or a list of indices (empty: a dense model).

    Raises:
        ValueError: a placement that is none of these, or that names a layer which does not exist.
    """
    if isinstance(placement, str):
        match = re.fullmatch(r"(every|last)\((\d+)\)", placement)
        if match is None:
            raise ValueError(f"sparse must be 'every(n)', 'last(n)' or a list of layers; got {placement!r}")
        n = int(match[2])
        if not 1 <= n <= num_layers:
            raise ValueError(f"sparse={placement!r} needs n from 1 to num_layers={num_layers}")
        chosen = range(n - 1, num_layers, n) if match[1] == "every" else range(num_layers - n, num_layers)
        return tuple(chosen)
    for index in placement:
        if not 0 <= index < num_layers:
            raise ValueError(f"sparse names layer {index}, but layers are 0 to {num_layers - 1}")
    return tuple(sorted(set(placement)))


def own_options(build: object) -> dict[str, Any]:
    """What a factory was given of its own, which goes before what the model would pass."""
    return build.keywords if isinstance(build, partial) else {}


def dense_layer(build: FeedForwardFactory, d_model: int, d_ff: int, dropout: float) -> nn.Module:
    """A dense layer with the model's dropout, unless `build` was given one."""
    return build(d_model=d_model, d_ff=d_ff, dropout=own_options(build).get("dropout", dropout))


def layer_widths(d_ff: int | Sequence[int], num_layers: int, name: str = "d_ff") -> tuple[int, ...]:
    """The hidden width of each layer, from one for all of them or a list with one for each.

    Raises:
        ValueError: a list of another length, a width below 1.
    """
    widths = (d_ff,) * num_layers if isinstance(d_ff, int) else tuple(d_ff)
    if len(widths) != num_layers:
        raise ValueError(f"{name} lists {len(widths)} widths for {num_layers} layers: give one for each, or a number")
    at_least(1, **{name: min(widths, default=1)})
    return widths


def leak(part: nn.Module) -> str | None:
    """Why a causal model of these layers would see the future; None: it would not."""
    return next((layer.leaks for layer in moe_layers(part).values() if layer.leaks), None)


def causal_layers(net: nn.Module) -> dict[str, MoELayer]:
    """The sparse layers of a model that must not see later tokens, by name: all but an encoder's."""
    reads = hasattr(net, "start_id")
    return {name: part for name, part in moe_layers(net).items() if not (reads and name.startswith("encoder."))}


def uncacheable(part: nn.Module) -> str | None:
    """Why these layers would decide otherwise on tokens given one at a time; None: they would not."""
    return next((layer.uncacheable for layer in moe_layers(part).values() if layer.uncacheable), None)


@contextmanager
def evaluating(net: nn.Module, parts: Sequence[nn.Module] | None = None) -> Iterator[None]:
    """Evaluation mode; after it, error or not, every part is as it was, one that trains beside one that does not
    included.

    `parts` are those of `net`, itself included, where they were gathered before: null: they are now.
    """
    parts = list(net.modules()) if parts is None else parts
    trained = [part for part in parts if part.training]
    if not trained:
        yield
        return
    whole = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(whole)
        if len(trained) < len(parts):
            before = set(map(id, trained))
            for part in parts:
                part.training = id(part) in before


def check_cache(uncacheable: str | None) -> None:
    """Refuses to begin a cache.

    Raises:
        ValueError: there is a reason against it.
    """
    if uncacheable is not None:
        raise ValueError(f"no cache with this model: {uncacheable}. Decode without one, or with capacity dropless")


def through(
    blocks: Iterable[nn.Module],
    x: Float[Tensor, "B S D"],
    valid: Bool[Tensor, "B S"] | None,
    ids: Int[Tensor, "B S"],
    cache: Cache | None,
    **given: Any,
) -> tuple[Float[Tensor, "B S D"], tuple[Routing, ...], tuple[Past, ...]]:
    """`x` through one block after another: the output, all records, and what the blocks keep where there is a cache."""
    routings: tuple[Routing, ...] = ()
    layers: list[Past] = []
    for index, block in enumerate(blocks):
        past = None
        if cache is not None:
            past = cache.layers[index] if cache.layers else Past()
        x, found, past = block(x, valid, ids, past=past, **given)
        routings += found
        if past is not None:
            layers.append(past)
    return x, routings, tuple(layers)
