"""Whether the records of a model are those of its sparse layers, one for each and in their order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from switchkit.layers import MoELayer
from switchkit.records import Routing

__all__ = ["RecordOrder", "check_records"]


def check_records(net: nn.Module, layers: Sequence[str], routings: Sequence[Routing]) -> None:
    """Raises ValueError where a model returned other than one record for each of its sparse `layers`."""
    if len(routings) != len(layers):
        raise ValueError(
            f"{type(net).__name__} returned {len(routings)} routing records for {len(layers)} sparse layers "
            f"({', '.join(layers)}): return one for each MoELayer, in the order of named_modules; a layer cannot be "
            "left out, or called twice"
        )


class RecordOrder:
    """Listens to the sparse layers of a model during one batch, and compares what they said with what the model says.

    Args:
        net: the model.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net = type(net).__name__
        layers = {name: part for name, part in net.named_modules() if isinstance(part, MoELayer)}
        self._layers = list(layers)
        self._heard: list[tuple[str, Routing]] = []
        self._hooks = [part.register_forward_hook(partial(self._hear, name)) for name, part in layers.items()]

    def _hear(self, name: str, layer: nn.Module, given: Any, result: Any) -> None:
        if not torch.compiler.is_compiling():
            self._heard.append((name, result[1]))

    def close(self) -> None:
        """Listen no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._heard = [], []

    def check(self, routings: Sequence[Routing]) -> None:
        """Compare, and listen no longer. Records that are none of the layers' own, as of a compiled model, pass.

        Raises:
            ValueError: they stand in another order.
        """
        names = [next((name for name, heard in self._heard if heard is routing), None) for routing in routings]
        self.close()
        if None not in names and names != self._layers:
            raise ValueError(
                f"{self._net} returned the records of its sparse layers in the order {', '.join(map(str, names))}; "
                f"return them in that of named_modules: {', '.join(self._layers)}"
            )
