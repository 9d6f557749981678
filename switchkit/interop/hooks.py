"""The records of our layers in a model that is not ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from switchkit.layers import MoELayer, moe_layers
from switchkit.records import Routing

__all__ = ["OutputOnly", "record"]


@contextmanager
def record(model: nn.Module) -> Iterator[list[Routing]]:
    """The records of every `MoELayer` in any model, in the order in which it runs them.

    ``with record(model) as routings: loss = model(x).loss + balance.weight * balance(routings)``. The list is emptied
    whenever the model is called, so that one `with` serves a whole training loop. Records carry gradients. The hooks
    are gone when the block ends.

    Raises:
        ValueError: a model without any of our layers.
    """
    layers = moe_layers(model).values()
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no MoELayer to record: put some in first, such as "
            "model.layers[1].mlp = OutputOnly(MoELayer(...))"
        )
    routings: list[Routing] = []

    def keep(layer: nn.Module, inputs: Any, result: tuple[Tensor, Routing]) -> None:
        routings.append(result[1])

    with ExitStack() as stack:
        first = model.register_forward_pre_hook(lambda *_: routings.clear())
        stack.callback(first.remove)
        for layer in layers:
            stack.callback(layer.register_forward_hook(keep).remove)
        yield routings


class OutputOnly(nn.Module):
    """A sparse layer as other models expect one: a tensor in, a tensor out. `record` gets its records."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        y, _ = self.layer(x)
        return y
