"""What tells two models apart in what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from switchkit.layers import MoELayer, moe_layers
from switchkit.routing.token_choice import TopK

__all__ = ["differences"]

ONLY_IN_TRAINING = frozenset(
    ("training", "dropout", "p", "jitter", "init_std", "init_scale", "alike", "sample", "temperature", "input_dropout")
)
TOLD_BY_PARTS = frozenset(
    (
        *("num_experts", "sparse", "encoder_sparse", "decoder_sparse", "sparse_attention"),
        *("d_ff", "encoder_d_ff", "decoder_d_ff"),
    )
)
"""Of a whole model; its layers, or the shapes of their weights, say the same."""
LENGTHS = (1, 2, 7, 64, 100, 1000)
NO_LIMITS = [None] * len(LENGTHS)


def differences(ours: nn.Module, theirs: nn.Module) -> Iterator[str]:
    """What `ours` has and `theirs` has not, or otherwise, in anything that tells in evaluation; shapes apart."""
    others = dict(theirs.named_modules())
    free = {layer.router for layer in moe_layers(ours).values() if _limits(layer) == NO_LIMITS}
    for name, part in ours.named_modules():
        where = name or "the model"
        other = others.pop(name, None)
        if other is None:
            yield f"{where} is a {type(part).__name__} that it has no place for"
            continue
        if type(part) is not type(other):
            yield f"{where} is a {type(part).__name__} instead of a {type(other).__name__}"
            continue
        yield from _settings(where, part, other, free=part in free)
    yield from (f"there is no {name} ({type(part).__name__})" for name, part in others.items())


def _settings(where: str, part: nn.Module, other: nn.Module, *, free: bool) -> Iterator[str]:
    """`free`: of a router whose experts have room for all."""
    left, right = _plain(part), _plain(other)
    if free and left.get("normalize") == "after":
        # The sum of those that found room is that of all.
        left["normalize"] = "before"
    if isinstance(part, MoELayer) and isinstance(other, MoELayer):
        yield from _capacities(where, part, other)
        if _limits(part) == _limits(other) == NO_LIMITS:
            # Without a capacity there is nothing to count over, and nothing is dropped.
            left, right = ({n: v for n, v in x.items() if n not in ("group", "dropped")} for x in (left, right))
    for name in sorted((left.keys() | right.keys()) - (TOLD_BY_PARTS if where == "the model" else set())):
        if left.get(name) != right.get(name):
            yield f"{where}.{name} is {left.get(name)!r} instead of {right.get(name)!r}"


def _capacities(where: str, part: MoELayer, other: MoELayer) -> Iterator[str]:
    mine, wanted = _limits(part), _limits(other)
    if mine != wanted:
        yield f"{where}.capacity is {_told(mine)} instead of {_told(wanted)} in evaluation"
    elif mine != NO_LIMITS:
        if type(part.capacity).place is not type(other.capacity).place:
            yield f"{where}.capacity is a {type(part.capacity).__name__}, which sends overflow elsewhere"
        if part.capacity.order != other.capacity.order:
            yield f"{where}.capacity.order is {part.capacity.order!r} instead of {other.capacity.order!r}"


def _limits(layer: MoELayer) -> list[int | None]:
    """Tokens an expert takes from sequences of several lengths; beyond any length is as good as no limit."""
    count, k = layer.num_experts, layer.router.k
    found = [layer.capacity.limit(size, count, k, training=False) for size in LENGTHS]
    return [None if limit is not None and limit >= 2**31 - 1 else limit for limit in found]


def _told(limits: list[int | None]) -> str:
    if len(set(limits)) == 1:
        return "without a limit" if limits[0] is None else f"{limits[0]} tokens"
    return f"{', '.join(map(str, limits))} tokens (of sequences of {', '.join(map(str, LENGTHS))})"


def _plain(part: nn.Module) -> dict[str, Any]:
    """The settings of a module: its own attributes that are plain values."""
    found = {
        name: value
        for name, value in vars(part).items()
        if not name.startswith("_")
        and name not in ONLY_IN_TRAINING
        and (value is None or isinstance(value, (bool, int, float, str, tuple)))
    }
    if isinstance(part, TopK) and part.softmax == "after":
        # The same weights by the words that families use: p_i / sum p of the chosen ones is their softmax.
        found |= {"softmax": "before", "normalize": "before" if part.normalize == "never" else part.normalize}
    return found
