"""A model on the whole held-out part of some data: its loss, how fast, and in how much memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from switchkit.metrics import cross_entropy
from switchkit.models.base import evaluating

__all__ = ["Evaluated", "evaluate"]


@dataclass(frozen=True)
class Evaluated:
    """What came out."""

    loss: float
    """Nats per real token."""
    tokens: int
    tokens_per_second: float
    parameters: int
    weights: int
    """Bytes of the weights."""
    peak: int | None
    """Most bytes allocated on a CUDA device while evaluating, weights included; null elsewhere."""


@torch.inference_mode()
def evaluate(net: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Evaluated:
    """`net` as it is in evaluation mode, on the device it is on; every part's mode is put back after.

    The time is that of the model alone. The first batch is run once more before, so that caches are filled.

    Raises:
        ValueError: no real token.
    """
    weights = next(net.parameters())
    device = weights.device
    total, tokens, seconds, warm = 0.0, 0, 0.0, False
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with evaluating(net):
        for batch in batches:
            here = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
            inputs = {name: here[name] for name in ("source", "source_valid") if name in here}
            if not warm:
                net(here["tokens"], here.get("valid"), **inputs)
                warm = True
            _settle(device)
            start = time.perf_counter()
            logits = net(here["tokens"], here.get("valid"), **inputs).logits
            _settle(device)
            seconds += time.perf_counter() - start
            nats, count = cross_entropy(logits, here["targets"], here.get("valid"))
            total, tokens = total + float(nats), tokens + int(count)
    if not tokens:
        raise ValueError("there is no held-out token to evaluate on")
    return Evaluated(
        total / tokens,
        tokens,
        tokens / seconds,
        sum(parameter.numel() for parameter in net.parameters()),
        sum(parameter.numel() * parameter.element_size() for parameter in net.parameters()),
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
