"""What every set of experts is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from switchkit.checks import at_least, finite_above, from_0_below_1, one_of
from switchkit.records import Rows
from switchkit.shown import options

__all__ = ["ACTIVATIONS", "Activation", "Experts", "ExpertsFactory", "check", "expert_of_row", "init_linear"]

Activation = Literal["relu", "gelu", "gelu_tanh", "quick_gelu", "silu"]


def quick_gelu(x: Tensor) -> Tensor:
    """``x * sigmoid(1.702 x)`` (arXiv 1606.08415, section 2)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}


class Experts(nn.Module):
    """The experts of one sparse layer, with weights stacked as [E, ...].

    `forward` takes rows in either layout of `Rows` and returns outputs in the same layout: zeros past ``load.sum()`` in
    the sorted one, anything past an expert's load in the padded one. An expert without a token gets a zero gradient.

    Counts of operations take stacked weights, and modules in a `ModuleList`, for one expert's each; an `nn.Linear`
    beside them for one that all share and every row meets; and `always_parameters` for what every token meets once.
    """

    def __init__(self, d_model: int, d_ff: int, num_experts: int) -> None:
        super().__init__()
        at_least(1, d_model=d_model, d_ff=d_ff, num_experts=num_experts)
        self.d_model, self.d_ff, self.num_experts = d_model, d_ff, num_experts

    def extra_repr(self) -> str:
        return options(self)

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

    def always_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters behind `always` and `mix`, which every token meets."""
        return iter(())


class ExpertsFactory(Protocol):
    """Anything that builds experts for given sizes: a class, a `functools.partial`, a YAML part."""

    def __call__(self, *, d_model: int, d_ff: int, num_experts: int) -> Experts: ...


def check(activation: Activation, dropout: float) -> tuple[Activation, float]:
    """The two options that feed-forward experts share, or a ValueError that says what would do."""
    from_0_below_1(dropout=dropout)
    return one_of("activation", activation, ACTIVATIONS), dropout


def expert_of_row(rows: Rows) -> Int[Tensor, "*layout"]:
    """Which expert computes each row; the number of experts for rows of no expert in the sorted layout."""
    experts = rows.load.shape[0]
    index = torch.arange(experts, device=rows.x.device)
    if rows.x.dim() == 3:
        return index.unsqueeze(-1).expand(experts, rows.x.shape[1])
    place = torch.arange(rows.x.shape[0], device=rows.x.device)
    return torch.searchsorted(rows.load.cumsum(0), place, right=True)


def init_linear(weight: Tensor, fan_in: int, scale: float = 0.1) -> None:
    """Truncated normal at two deviations, std ``sqrt(scale / fan_in)`` (section 2.4 of arXiv 2101.03961).

    The paper divides the usual scale of 1 by ten, which its Table 3 shows to be steadier.

    Raises:
        ValueError: a scale that is not a finite number above 0.
    """
    finite_above(0, init_scale=scale)
    std = math.sqrt(scale / fan_in)
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
