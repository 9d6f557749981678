"""The layers that are measured against each other."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from switchkit.bench.memory import needed, room
from switchkit.bench.peers import mixtral
from switchkit.bench.shapes import Shape
from switchkit.dispatch.base import Dispatcher
from switchkit.experts.feed_forward import GatedMlp, Mlp
from switchkit.layers import MoELayer
from switchkit.registry import lookup
from switchkit.routing.token_choice import Switch, TopK

__all__ = ["DTYPES", "FOREIGN", "Contestant", "Dense", "Setup", "build", "inputs", "output", "step"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

FOREIGN = ("sorted, compiled", "Mixtral, grouped_mm")
"""Contestants that may fail, for reasons that are a compiler's or another library's."""


@dataclass(frozen=True)
class Setup:
    """Where and what to measure."""

    device: torch.device
    dtype: str
    dispatchers: Sequence[str]
    rounds: int | None = None
    peers: bool = False
    compile: bool = False


@dataclass(frozen=True)
class Contestant:
    """One layer in the race; `base` is the dense one that it is compared with."""

    name: str
    base: str
    layer: nn.Module


class Dense(nn.Module):
    """The dense layer of equal FLOPs: k times as wide as an expert, the same activation."""

    def __init__(self, shape: Shape, gated: bool) -> None:
        super().__init__()
        width = shape.k * shape.d_ff
        self.up = nn.Linear(shape.d_model, width, bias=False)
        self.gate = nn.Linear(shape.d_model, width, bias=False) if gated else None
        self.down = nn.Linear(width, shape.d_model, bias=False)

    def forward(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        up = self.up(x)
        return self.down(F.relu(up) if self.gate is None else F.silu(self.gate(x)) * up)


def build(shape: Shape, setup: Setup, groups: tuple[int, int]) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants, the dense one first, and why others were left out. All sparse ones share their weights."""
    dtype, device = DTYPES[setup.dtype], setup.device
    left_out: dict[str, str] = {}
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        sparse = MoELayer(
            shape.d_model,
            shape.experts,
            d_ff=shape.d_ff,
            router=Switch if shape.k == 1 else partial(TopK, k=shape.k),
            experts=GatedMlp if shape.gated else Mlp,
        )
        found = [Contestant("dense", "dense", Dense(shape, shape.gated))]
        for name in setup.dispatchers:
            size = needed(name, shape, groups, dtype.itemsize, device.type)
            if size > room(device):
                left_out[name] = f"left out: one of its tensors would hold {size / 2**30:.3g} GiB"
                continue
            found.append(Contestant(name, "dense", _with(sparse, lookup(name, Dispatcher)())))
        if setup.compile:
            ours = _with(sparse, lookup("sorted", Dispatcher)())
            compiled = cast(nn.Module, torch.compile(ours, fullgraph=True, dynamic=False))
            found.append(Contestant(FOREIGN[0], "dense", compiled))
        if setup.peers:
            base = "dense" if shape.gated else "dense, gated"
            if not shape.gated:
                found.append(Contestant(base, base, Dense(shape, True)))
            found.append(Contestant(FOREIGN[1], base, mixtral(shape)))
    for contestant in found:
        contestant.layer.to(device=device, dtype=dtype)
    return found, left_out


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    """Forward and backward for the input and all weights; no gradient is left behind."""
    output(layer, x).backward(grad)  # type: ignore[no-untyped-call]
    x.grad = None
    for weight in layer.parameters():
        weight.grad = None


def inputs(shape: Shape, groups: tuple[int, int], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same random tokens for all, and a dense random gradient: a constant one would be spared memory traffic."""
    generator = torch.Generator(device).manual_seed(1)
    size = (*groups, shape.d_model)
    x, grad = (torch.randn(size, generator=generator, device=device, dtype=dtype) for _ in range(2))
    return x.requires_grad_(), grad


def output(layer: nn.Module, x: Tensor) -> Tensor:
    """A sparse layer of ours returns its record too."""
    y = layer(x)
    found = y[0] if isinstance(y, tuple) else y
    assert isinstance(found, Tensor)
    return found


def _with(layer: MoELayer, dispatcher: Dispatcher) -> MoELayer:
    """The same layer with another dispatcher: a shallow copy shares all modules and weights."""
    other = copy.copy(layer)
    other.dispatcher = dispatcher
    return other
