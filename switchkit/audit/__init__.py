"""What a configuration does to itself, measured: leaks, dependence on the batch, chance, padding, gradients, scales.

No training data is needed: random token ids (seeded) go through copies of the model, in float64 where its parts allow
it, so that a difference is a dependence and not rounding.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from switchkit.audit.decoding import cached
from switchkit.audit.dependence import FUTURE, chance, future, padding, rest_of_batch
from switchkit.audit.gradients import counted_once, gradients, recomputed
from switchkit.audit.numbers import equal_experts, precision, saturation, scales, uniform_routing
from switchkit.audit.probe import Finding, Status, counted_group, make_probe, sparse_layers
from switchkit.module import LanguageModule

__all__ = ["LONG", "Finding", "Status", "audit", "sees_future", "sequences_for", "uniform_routing"]

LONG = 128
"""Tokens of a sequence for a model that takes any number."""
_FEW = 3
_BATCH, _GROUP = 2048, 4096
"""Tokens of more than a few sequences, at most: for the sake of the data's batch, and to fill a group."""


def audit(
    module: LanguageModule,
    *,
    context: int | None = None,
    sequences: int | None = None,
    trained: bool = False,
    seed: int = 0,
) -> list[Finding]:
    """Measure what a configuration does; `module` stays as it is, and so does the state of the random numbers.

    A model with a part that leaks must have been built with `allow_leak`.

    Args:
        module: the model and its losses.
        context: tokens of a sequence; None: the longest that the model takes, or 128. An encoder-decoder reads as many.
        sequences: sequences of a batch, at least 2; None: those of `sequences_for`.
        trained: the weights are those of a checkpoint, and the lines about the start say so.
        seed: of the token ids and of the noise in training.

    Raises:
        ValueError: fewer than 2 sequences, a context below 2, or a loss that does not fit the router.
    """
    if sequences is not None and sequences < 2:
        raise ValueError(f"an audit compares sequences of one batch: give at least 2; got {sequences}")
    size = int(getattr(module.net, "context", LONG)) if context is None else context
    if size < 2:
        raise ValueError(f"an audit edits the tail of a sequence and watches its head: give context >= 2; got {size}")
    sequences = sequences_for(module, size) if sequences is None else sequences
    device = module.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        probe = make_probe(module, sequences, size, seed)
        found = [*future(probe), rest_of_batch(probe), chance(probe), padding(probe), cached(probe)]
        if probe.layers:
            found += [*gradients(probe), counted_once(probe), recomputed(probe), precision(probe)]
            found += [equal_experts(probe, trained), saturation(probe, trained), *scales(probe)]
    return found


def sequences_for(module: LanguageModule, context: int, batch_size: int = 0) -> int:
    """How many sequences of `context` tokens show what the layers do.

    3 where each sequence is a routing group. Else a batch of the data, of some 2048 tokens at most; and as many as fill
    a group that has a number of tokens, up to 4096, since its capacity binds in a full one alone.
    """
    layers = sparse_layers(module.net).values()
    if all(layer.group == "sequence" for layer in layers):
        return _FEW
    groups = [group for group in map(counted_group, layers) if group <= _GROUP]
    fill = -(-max(groups, default=0) // context)
    return max(_FEW, fill, min(batch_size, -(-_BATCH // context)))


def sees_future(findings: Iterable[Finding]) -> bool:
    """Whether the model was seen to read future tokens."""
    return any(finding.check == FUTURE and finding.status == "fault" for finding in findings)
