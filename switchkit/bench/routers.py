"""What routing alone costs: every router, with the placing of its assignments, against the dense layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from switchkit.bench.contestants import DTYPES, Dense, Setup, inputs, step
from switchkit.bench.shapes import Shape
from switchkit.bench.timing import clock_of, interleave, ratios
from switchkit.capacity.policies import Dropless
from switchkit.registry import named
from switchkit.routing.base import Router

__all__ = ["routing"]


def routing(shape: Shape, setup: Setup) -> dict[str, Any]:
    """Forward and backward of each registered router at a shape, in training mode, as plain data.

    k is the shape's where the router has such an option. Experts and dispatch are left out; the gradient is that of all
    weights and probabilities.
    """
    device, dtype = setup.device, DTYPES[setup.dtype]
    groups = shape.groups(64 if device.type == "cpu" else 2048)
    runs: dict[str, Callable[[], object]] = {}
    notes: dict[str, str] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x, grad = inputs(shape, groups, device, dtype)
        dense = Dense(shape, shape.gated).to(device=device, dtype=dtype)
        runs["dense"] = partial(step, dense, x, grad)
        for name, cls in named(Router).items():
            options = {"k": shape.k} if "k" in inspect.signature(cls).parameters else {}
            try:
                router = cls(shape.d_model, shape.experts, **options).to(device=device, dtype=dtype)
                run = partial(_route, router, x)
                run()
            except (ValueError, ImportError) as error:
                notes[name] = str(error).partition("\n")[0]
                continue
            runs[name] = run
        timings = interleave(runs, clock_of(device), setup.rounds, warm=True)
    rows = []
    for name, timing in timings.items():
        ratio, low, high = ratios(timing, timings["dense"])
        rows.append({"name": name, "ratio": ratio, "quartiles": [low, high], "ms": 1000 * timing.median})
    rows += [{"name": name, "note": note} for name, note in notes.items()]
    return {"shape": str(shape), "dtype": setup.dtype, "rounds": len(timings["dense"].seconds), "rows": rows}


def _route(router: Router, x: Tensor) -> None:
    valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    ids = torch.arange(valid.numel(), device=x.device).view_as(valid) % 64
    found = Dropless().place(replace(router(x, None, valid, ids), batch=len(x)), None, training=True)
    score = found.weight.sum() + found.probs.square().sum()
    if score.requires_grad:
        score.backward()  # type: ignore[no-untyped-call]
    x.grad = None
    for weight in router.parameters():
        weight.grad = None
