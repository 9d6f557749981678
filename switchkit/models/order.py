"""Whether the records of a model are those of its sparse layers, one for each and in their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from switchkit.layers import moe_layers
from switchkit.records import Routing

__all__ = ["check_records", "listened"]


def check_records(net: nn.Module, layers: Sequence[str], routings: Sequence[Routing]) -> None:
    """Raises ValueError where a model returned other than one record for each of its sparse `layers`."""
    if len(routings) != len(layers):
        raise ValueError(
            f"{type(net).__name__} returned {len(routings)} routing records for {len(layers)} sparse layers "
            f"({', '.join(layers)}): return one for each MoELayer, in the order of named_modules; a layer cannot be "
            "left out, or called twice"
        )


def listened(net: nn.Module, *inputs: Any, **named: Any) -> Any:
    """What a model returns, its records compared with what its sparse layers said.

    A compiled model is called as it is: hooks would be compiled with it.

    Raises:
        ValueError: they stand in another order than that of `named_modules`.
    """
    if torch.compiler.is_compiling() or any(_compiled(part) for part in net.modules()):
        return net(*inputs, **named)
    layers = {part: name for name, part in moe_layers(net).items()}
    heard: list[tuple[str, Routing]] = []
    hooks = [part.register_forward_hook(lambda p, _, out: heard.append((layers[p], out[1]))) for part in layers]
    try:
        output = net(*inputs, **named)
    finally:
        for hook in hooks:
            hook.remove()
    names = [next((name for name, record in heard if record is routing), None) for routing in output.routings]
    # Records that are none of the layers' own say nothing of the order, and how many there are is another question.
    if None not in names and len(names) == len(layers) and names != list(layers.values()):
        raise ValueError(
            f"{type(net).__name__} returned the records of its sparse layers in the order "
            f"{', '.join(map(str, names))}; return them in that of named_modules: {', '.join(layers.values())}"
        )
    return output


def _compiled(part: nn.Module) -> bool:
    """By ``module.compile()``, by ``torch.compile(module)``, or of its forward alone."""
    return part._compiled_call_impl is not None or hasattr(part, "_orig_mod") or "forward" in vars(part)
