"""How memory grows with the tokens of one sequence: linearly, or not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from switchkit.bench.contestants import DTYPES, Setup, build, inputs
from switchkit.bench.layer import bytes_of
from switchkit.bench.shapes import Shape

__all__ = ["growth"]


def growth(shape: Shape, setup: Setup) -> dict[str, Any]:
    """Bytes at a quarter, at half and at all of the shape's tokens, each time as one sequence, that is as one group."""
    dtype = DTYPES[setup.dtype]
    setup = replace(setup, peers=False, compile=False)
    tokens = [max(1, shape.tokens // part) for part in (4, 2, 1)]
    found: dict[str, list[int | None]] = {}
    notes: dict[str, str] = {}
    for index, count in enumerate(tokens):
        smaller = replace(shape, tokens=count)
        contestants, left_out = build(smaller, setup, (1, count))
        notes |= left_out
        x, grad = inputs(smaller, (1, count), setup.device, dtype)
        for contestant in contestants:
            figures = found.setdefault(contestant.name, [None] * len(tokens))
            try:
                figures[index] = bytes_of(contestant.layer, x, grad)
            except torch.OutOfMemoryError:
                notes[contestant.name] = "out of memory"
    rows = [
        {"name": name, "bytes": found.get(name, [None] * len(tokens)), "note": notes.get(name)}
        for name in dict.fromkeys([*found, *notes])
    ]
    what = "peak of forward and backward" if setup.device.type == "cuda" else "kept for the backward pass"
    return {"shape": str(shape), "dtype": setup.dtype, "what": what, "tokens": tokens, "rows": rows}
