"""Whether the records of a model stand in the order of its sparse layers, found at its first batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from switchkit.layers import MoELayer
from switchkit.records import Routing

__all__ = ["RecordOrder"]


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
