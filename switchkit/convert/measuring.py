"""What the experts of a model are used for, on some data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from switchkit.layers import MoELayer, moe_layers
from switchkit.metrics import cross_entropy
from switchkit.models.base import evaluating
from switchkit.module import LanguageModule
from switchkit.records import Routing, count_tokens, kept_ones, load, per_token, sum_weights, undropped_weights

__all__ = ["ExpertUse", "Measured", "assumed", "measure", "weight_of_every_token"]


@dataclass(frozen=True)
class ExpertUse:
    """Sums over the real tokens that one sparse layer saw, in float64 on the CPU."""

    layer: str
    """Its name in the model, such as ``blocks.1.mlp``."""
    load: Float[Tensor, "E"]
    """Assignments of each expert, before the drop."""
    weight: Float[Tensor, "E"]
    """Sum of the weights with which its outputs came back; what was dropped came back with none."""
    tokens: int
    """Real tokens; 0: nothing was measured, and the sums are those of one token, see `assumed`."""
    alike: Float[Tensor, "E E"]
    """Cosine of the router's logits for two experts, over all tokens: what MC-SMoE groups experts by."""
    undropped: float
    """Sum of the weights that the tokens would have had if every expert had room for all of its own."""

    @property
    def share(self) -> Float[Tensor, "E"]:
        """Share of each expert in the assignments; zeros where there was none."""
        return self.load / self.load.sum().clamp(min=1)

    @property
    def gate(self) -> float:
        """Mean over the tokens of the sum of their weights: what the routed experts are multiplied by.

        It is what `switchkit.convert.merging.feed_forward_of` takes: 1 for weights that sum to one, the mean
        probability for `switch`. One number for all experts, since a weight that is large in one expert is small in
        another of the same token: with a mean for each, copies would not merge into what they were.
        """
        return float(self.weight.sum()) / max(self.tokens, 1)

    @property
    def gate_undropped(self) -> float:
        """`gate` if nothing had been dropped: what the experts that serve a token are multiplied by in it.

        It does not depend on the capacity, which fewer experts have more of each.
        """
        return self.undropped / max(self.tokens, 1)


@dataclass(frozen=True)
class Measured:
    """What a model did with some data."""

    layers: tuple[ExpertUse, ...]
    """In the order of `LanguageModule.sparse_layers`."""
    loss: float | None
    """Mean cross-entropy in nats per token; None where nothing was measured."""


@torch.no_grad()
def measure(module: LanguageModule, batches: Iterable[Mapping[str, Tensor]], *, limit: int | None = None) -> Measured:
    """Run a model over batches in evaluation, on its own device, and add up its records.

    Args:
        module: stays as it is, every part in the mode that it is in.
        batches: as `LanguageModule` takes them; a data loader.
        limit: batches to read; null: all.

    Raises:
        ValueError: no batch, or none with a real token.
    """
    sums: list[list[Tensor]] = []
    nats, counted = 0.0, 0
    with evaluating(module):
        for batch in islice(batches, limit):
            given = {name: tensor.to(module.device) for name, tensor in batch.items()}
            source = {name: given[name] for name in ("source", "source_valid") if name in given}
            out = module.net(given["tokens"], given.get("valid"), **source)
            total, tokens = cross_entropy(out.logits, given["targets"], given.get("valid"))
            nats, counted = nats + float(total), counted + int(tokens)
            found = [_sums(routing) for routing in out.routings]
            sums = (
                found
                if not sums
                else [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(sums, found, strict=True)]
            )
    if not counted:
        raise ValueError("nothing to measure: the data gave no batch with a real token")
    layers = (_use(name, *found) for name, found in zip(module.sparse_layers, sums, strict=True))
    return Measured(tuple(layers), nats / counted)


def assumed(module: LanguageModule) -> Measured:
    """What stands in for a measurement without data: all experts used alike, as like as the router's rows.

    The weights of a token sum to what they always do, see `weight_of_every_token`, or else to 1. Experts of a router
    without a row for each are like themselves alone.
    """
    layers = []
    for name, layer in moe_layers(module.net).items():
        count = layer.num_experts
        known = weight_of_every_token(layer)
        gate = 1.0 if known is None else known
        weight = torch.full((count,), gate / count, dtype=torch.float64)
        layers.append(ExpertUse(name, torch.ones_like(weight), weight, 0, _alike(layer), gate))
    return Measured(tuple(layers), None)


@torch.no_grad()
def weight_of_every_token(layer: MoELayer) -> float | None:
    """What the weights of any token sum to in evaluation, drops not taken off; None: it depends on the token.

    It is what a normalising router multiplies the routed experts by, data or none. The router is asked of random
    tokens, in its own dtype.
    """
    router, like = layer.router, next(layer.parameters(), torch.zeros(()))
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 64, router.d_model, generator=draw).to(like)
    valid = torch.ones(1, 64, dtype=torch.bool, device=like.device)
    limit = layer.capacity.limit(64, layer.num_experts, router.k, training=False)
    with evaluating(router):
        # Whatever the vocabulary is, it has a first symbol.
        routing = router(tokens, limit, valid, torch.zeros_like(valid, dtype=torch.long))
    if routing.renormalize:
        return routing.scale
    total = per_token(routing, routing.weight.double().masked_fill(~routing.chosen, 0))
    mean = total.mean()
    return float(mean) if torch.allclose(total, mean.expand_as(total), rtol=1e-3, atol=0) else None


def _alike(layer: MoELayer) -> Float[Tensor, "E E"]:
    for name in ("weight", "embedding"):
        rows = getattr(layer.router, name, None)
        if isinstance(rows, Tensor) and rows.dim() == 2 and len(rows) == layer.num_experts:
            rows = rows.detach().double().cpu()
            return _cosine(rows @ rows.t())
    return torch.eye(layer.num_experts, dtype=torch.float64)


def _sums(routing: Routing) -> list[Tensor]:
    """What adds up over batches."""
    logits = routing.logits.double().masked_fill(~routing.valid.unsqueeze(-1), 0).flatten(0, 1)
    kept = replace(routing, weight=routing.weight.double(), chosen=kept_ones(routing), asked=None, given=None)
    tokens, undropped = count_tokens(routing), undropped_weights(routing).double().masked_fill(~routing.chosen, 0).sum()
    parts = [load(routing), sum_weights(kept), tokens, logits.t() @ logits, undropped]
    return [part.double().cpu() for part in parts]


def _use(name: str, load: Tensor, weight: Tensor, tokens: Tensor, gram: Tensor, undropped: Tensor) -> ExpertUse:
    return ExpertUse(name, load, weight, int(tokens), _cosine(gram), float(undropped))


def _cosine(gram: Float[Tensor, "E E"]) -> Float[Tensor, "E E"]:
    length = gram.diagonal().sqrt()
    return gram / (length[:, None] * length).clamp(min=torch.finfo(gram.dtype).tiny)
