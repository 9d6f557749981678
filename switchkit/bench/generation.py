"""Tokens per second of generation, with a key/value cache and without."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from switchkit.bench.timing import Clock, CpuClock, CudaClock, interleave, ratios
from switchkit.capacity.policies import Factor
from switchkit.generation import generate
from switchkit.layers import MoELayer
from switchkit.models import Decoder
from switchkit.routing.token_choice import Switch

__all__ = ["GOAL", "ROUNDS", "WIDTHS", "measure"]

GOAL = 5.0
"""How many times as fast a cache should make 512 tokens, on two CPU cores."""
WIDTHS = (128, 256)
"""A little more than the recipe's, and twice that: with a cache a narrow model waits for Python, not for products."""
ROUNDS = 2
"""Without a cache a round takes seconds."""


def measure(device: torch.device, rounds: int | None, count: int, width: int) -> dict[str, Any]:
    """`count` tokens from a prompt of one, by a model like the recipe `tiny_shakespeare`'s with room for twice as many.

    Its weights are random, which changes no cost. The longest text is `count` tokens, so that nothing is forgotten.
    """
    net = _model(2 * count, width).to(device)
    prompt = torch.zeros(1, 1, dtype=torch.long, device=device)

    def run(use_cache: bool) -> Tensor:
        draws = torch.Generator().manual_seed(0)
        return generate(net, prompt, max_new_tokens=count, use_cache=use_cache, generator=draws).tokens

    contestants: dict[str, Callable[[], object]] = {"cached": partial(run, True), "uncached": partial(run, False)}
    timings = interleave(contestants, _clock(device), ROUNDS if rounds is None else rounds)
    return {
        "new_tokens": count,
        "d_model": width,
        "parameters": sum(p.numel() for p in net.parameters()),
        "rounds": len(timings["cached"].seconds),
        "ratio": ratios(timings["uncached"], timings["cached"])[0],
        "goal": GOAL if (device.type, count) == ("cpu", 512) else None,
        "rows": [
            {
                "name": name,
                "seconds": timing.median,
                "min_seconds": timing.least,
                "tokens_per_second": count / timing.median,
            }
            for name, timing in timings.items()
        ],
    }


def _clock(device: torch.device) -> Clock:
    return CudaClock(device, repeats=1) if device.type == "cuda" else CpuClock()


def _model(context: int, width: int) -> Decoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        moe = partial(MoELayer, router=Switch, capacity=partial(Factor, train=1.25))
        net = Decoder(65, d_model=width, num_heads=4, d_ff=4 * width, num_experts=8, context=context, moe=moe)
    return net.eval()
