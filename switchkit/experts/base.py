"""What every set of experts is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Protocol

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from switchkit.records import Rows

__all__ = ["ACTIVATIONS", "Activation", "Experts", "ExpertsFactory", "check", "init_linear"]

Activation = Literal["relu", "gelu", "silu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class Experts(nn.Module):
    """The experts of one sparse layer, with weights stacked as [E, ...].

    `forward` takes rows in either layout of `Rows` and returns outputs in the same layout: zeros past ``load.sum()`` in
    the sorted one, anything past an expert's load in the padded one. An expert without a token gets a zero gradient.
    """

    def __init__(self, d_model: int, d_ff: int, num_experts: int) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_ff", d_ff), ("num_experts", num_experts)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.d_model, self.d_ff, self.num_experts = d_model, d_ff, num_experts

    def forward(self, rows: Rows) -> Float[Tensor, "*layout D"]:
        """Each row through its own expert."""
        raise NotImplementedError

    def always(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"] | None:
        """What every token gets beside its routed experts (shared experts); None: nothing."""
        return None

    def mix(
        self, routed: Float[Tensor, "B S D"], always: Float[Tensor, "B S D"], x: Float[Tensor, "B S D"]
    ) -> Float[Tensor, "B S D"]:
        """How the routed and the always-on outputs are put together."""
        return routed + always


class ExpertsFactory(Protocol):
    """Anything that builds experts for given sizes: a class, a `functools.partial`, a YAML part."""

    def __call__(self, *, d_model: int, d_ff: int, num_experts: int) -> Experts: ...


def check(activation: Activation, dropout: float) -> tuple[Activation, float]:
    """The two options that feed-forward experts share, or a ValueError that says what would do."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1); got {dropout}")
    return activation, dropout


def init_linear(weight: Tensor, fan_in: int) -> None:
    """Truncated normal at two deviations, std ``sqrt(0.1 / fan_in)`` (section 2.4 of arXiv 2101.03961)."""
    std = math.sqrt(0.1 / fan_in)
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
