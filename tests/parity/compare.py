"""How far a layer is from a reference with the same weights: outputs, losses and every gradient, by relative norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from switchkit.layers import MoELayer
from switchkit.losses.base import Loss
from switchkit.presets import preset_parts

SEED = 13
"""Of weights with which something is dropped wherever a reference says so."""

CLOSE = 1e-5
"""What parity asks for; a fault must be a hundred times further away."""

# Parameters by the layer's own names, and the input [B, S, D]: outputs, and the loss terms of one layer or of all.
Reference = Callable[[Mapping[str, Tensor], Tensor], tuple[Tensor, Sequence[Tensor]]]


def make(name: str, *, d_model: int = 6, d_ff: int = 5, num_experts: int = 4, train: bool = True, **parts) -> MoELayer:
    """The layer of a preset as published, with weights large enough that experts and probabilities differ."""
    moe = preset_parts(name, as_published=True).moe
    layer = moe(d_model=d_model, d_ff=d_ff, num_experts=num_experts, **parts)
    # Not before: releases of torch differ in how many numbers a truncated normal takes.
    torch.manual_seed(SEED)
    for key, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.8 if "router" in key else 0.5)
    return layer.train(train)


def losses(name: str) -> list[Loss]:
    return [make_loss() for make_loss in preset_parts(name, as_published=True).losses]


def distances(
    layer: MoELayer, terms: Sequence[Loss], reference: Reference, x: Tensor, ids: Tensor | None = None
) -> dict[str, float]:
    """Of the output, each loss, and the gradients of both with respect to the input and every parameter."""
    own = dict(layer.named_parameters())
    copies = {name: parameter.detach().clone().requires_grad_() for name, parameter in own.items()}
    torch.manual_seed(2)
    ours = _all(lambda x: _run(layer, terms, x, ids), own, x)
    torch.manual_seed(2)
    theirs = _all(lambda x: reference(copies, x), copies, x)
    assert ours.keys() == theirs.keys()
    return {name: _distance(ours[name], theirs[name]) for name in ours}


def same(found: Mapping[str, float]) -> None:
    far = {name: distance for name, distance in found.items() if not distance < CLOSE}
    assert not far, far


def different(found: Mapping[str, float]) -> None:
    assert max(found.values()) > 100 * CLOSE, found


def _run(layer: MoELayer, terms: Sequence[Loss], x: Tensor, ids: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    y, routing = layer(x, None, ids)
    return y, [term.weight * term((routing,)) for term in terms]


def _all(run: Callable[[Tensor], tuple[Tensor, Sequence[Tensor]]], params: Mapping[str, Tensor], x: Tensor) -> dict:
    x = x.detach().clone().requires_grad_()
    y, terms = run(x)
    leaves = {"x": x, **params}
    probe = torch.linspace(-1, 1, y.numel()).view(y.shape)
    found = {"y": y}
    for name, value in {"y": (y * probe).sum(), **{f"loss {i}": term for i, term in enumerate(terms)}}.items():
        if name != "y":
            found[name] = value
        if value.requires_grad:
            grads = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True)
            for leaf, grad in zip(leaves, grads, strict=True):
                found[f"{name} by {leaf}"] = torch.zeros_like(leaves[leaf]) if grad is None else grad
    return {name: value.detach() for name, value in found.items()}


def _distance(ours: Tensor, theirs: Tensor) -> float:
    size = theirs.norm().item()
    return (ours - theirs).norm().item() / (size if size > 1e-6 else 1)


def put(path: str, value: object) -> Callable[[MoELayer, Sequence[Loss]], None]:
    """Sets one option of a layer, with ``loss0.`` and so on one of its losses."""

    def change(layer, terms) -> None:
        *holders, name = path.split(".")
        for holder in holders:
            layer = terms[int(holder[4:])] if holder.startswith("loss") else getattr(layer, holder)
        assert hasattr(layer, name)
        setattr(layer, name, value)

    return change
