"""Whether generation with a cache computes what a forward of the whole does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from switchkit.audit.probe import Finding, Probe, called, changed, hooked, without_drops
from switchkit.models import Cache

__all__ = ["CACHED", "cached"]

CACHED = "cached generation"
STEPS = 16
"""Tokens given one by one; the rest come at once."""


def cached(probe: Probe) -> Finding:
    """Tokens one by one and then the rest, and the other way round, with a cache, against all of them in one forward.

    A model that says why it keeps no cache is taken at its word, and its sparse layers are given the same pieces.
    """
    net: Any = probe.net
    if not hasattr(net, "uncacheable"):
        return Finding(CACHED, "ok", f"{type(net).__name__} keeps no cache: every token is computed with all before it")
    size = probe.tokens.shape[1]
    ones = min(STEPS, size - 1)
    orders = {
        "one by one, then the rest": [1] * ones + [size - ones],
        "the other way round": [size - ones] + [1] * ones,
    }
    if net.uncacheable is not None:
        return _declared(probe, net.uncacheable, orders)
    whole = probe(probe.tokens, training=False).logits
    found = {name: probe.differ(whole, _decoded(probe, sizes)) for name, sizes in orders.items()}
    told = "; ".join(f"{name}: {changed(value)}" for name, value in found.items())
    evidence = f"logits of {size} tokens with a cache, {ones} of them {told}"
    if not any(found.values()):
        return Finding(CACHED, "ok", evidence)
    layers = [name for name, value in _layers(probe, orders).items() if value]
    fix = (
        "a router that decides on more than one token says so by `by_position` or `leaks`, so that generation uses no "
        "cache; other layers must keep what they need of earlier tokens in theirs"
    )
    return Finding(CACHED, "fault", f"{evidence}; in {', '.join(layers) or 'no sparse layer'}", fix)


def _declared(probe: Probe, reason: str, orders: dict[str, list[int]]) -> Finding:
    """Generation computes the whole for each token: right, and slow."""
    found = _layers(probe, orders)
    seen = [f"{name} {value:.2g}" for name, value in found.items() if value]
    told = f"changed by {', '.join(seen)} of their size" if seen else "unchanged on these tokens"
    evidence = f"uses no cache: {reason}; outputs of sparse layers for pieces of the sequence: {told}"
    layers = [layer for layer in probe.causal.values() if layer.uncacheable]
    if not layers:
        return Finding(CACHED, "note", evidence)
    routers = any(layer.router.leaks or layer.router.by_position for layer in layers)
    other = "--model.moe.router=top_k (or switch, sigmoid, ...)"
    return Finding(CACHED, "note", evidence, other if routers else without_drops(layers))


def _decoded(probe: Probe, sizes: list[int]) -> Tensor:
    """Logits of all tokens, given in pieces."""
    probe.net.eval()
    torch.manual_seed(probe.seed)
    cache, logits = Cache(), []
    for piece in probe.tokens.split_with_sizes(sizes, dim=1):
        with torch.no_grad():
            out = probe.net(piece, cache=cache)
        cache = out.cache
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def _layers(probe: Probe, orders: dict[str, list[int]]) -> dict[str, float]:
    """How much the output of each sparse layer changes when it is given its input in pieces."""
    calls: dict[str, tuple[Tensor, Tensor | None, Tensor]] = {}

    def keep(name: str) -> Any:
        def look(_: nn.Module, args: Any, kwargs: Any, out: tuple[Tensor, Any]) -> None:
            x, _, ids = called(*args, **kwargs)
            calls[name] = x, ids, out[0]

        return look

    with hooked(layer.register_forward_hook(keep(name), with_kwargs=True) for name, layer in probe.causal.items()):
        probe(probe.tokens, training=False)
    found: dict[str, float] = {}
    for name, (x, ids, whole) in calls.items():
        layer = probe.causal[name]
        for sizes in orders.values():
            names = [None] * len(sizes) if ids is None else ids.split_with_sizes(sizes, dim=1)
            with torch.no_grad():
                parts = [
                    layer(piece, None, some)[0]
                    for piece, some in zip(x.split_with_sizes(sizes, dim=1), names, strict=True)
                ]
            found[name] = max(found.get(name, 0.0), probe.differ(whole, torch.cat(parts, dim=1)))
    return found
