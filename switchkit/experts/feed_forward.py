"""Feed-forward experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from switchkit.experts.base import ACTIVATIONS, Activation, Experts, check, init_linear
from switchkit.experts.gated import gated
from switchkit.experts.grouped import ends_of, grouped_linear, grouped_relu_mlp
from switchkit.kernels.precision import autocasts
from switchkit.records import Rows
from switchkit.registry import register

__all__ = ["GatedMlp", "Mlp"]


class _FeedForward(Experts):
    """What the two kinds share: a product into the hidden width, one out of it, and their options."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        hidden: int,
        activation: Activation,
        bias: bool,
        dropout: float,
        init_scale: float,
        alike: bool = False,
    ) -> None:
        super().__init__(d_model, d_ff, num_experts)
        self.activation, self.dropout = check(activation, dropout)
        self.alike, self.init_scale = alike, init_scale
        self.w1 = nn.Parameter(torch.empty(num_experts, d_model, hidden))
        self.w2 = nn.Parameter(torch.empty(num_experts, d_ff, d_model))
        self.b1 = nn.Parameter(torch.zeros(num_experts, hidden)) if bias else None
        self.b2 = nn.Parameter(torch.zeros(num_experts, d_model)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_linear(self.w1, self.d_model, self.init_scale)
        init_linear(self.w2, self.d_ff, self.init_scale)
        if self.alike:
            with torch.no_grad():
                for weight in (self.w1, self.w2):
                    weight.copy_(weight[:1].expand_as(weight).clone())
        for bias in (self.b1, self.b2):
            if bias is not None:
                nn.init.zeros_(bias)


@register("mlp")
class Mlp(_FeedForward):
    """``act(x W1) W2``, ReLU and no bias by default (T5, and the paper's experts).

    `dropout` is the expert dropout: on the hidden activations of the experts alone, apart from the model's dropout.
    Weights are independent draws, truncated normal with std ``sqrt(init_scale / fan_in)``, 0.1 as in the paper; with
    `alike` all experts start as copies of one, and only their tokens tell them apart.

    Elsewhere: labml's experts are copies of one, and V-MoE's share one initialisation.

    Raises:
        ValueError: sizes below 1, dropout outside [0, 1), an unknown activation, an init_scale not above 0.

    Source: arXiv 2101.03961, sections 2.1 and 2.4.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        *,
        activation: Activation = "relu",
        bias: bool = False,
        dropout: float = 0.0,
        alike: bool = False,
        init_scale: float = 0.1,
    ) -> None:
        super().__init__(d_model, d_ff, num_experts, d_ff, activation, bias, dropout, init_scale, alike)

    def forward(self, rows: Rows) -> Float[Tensor, "*layout D"]:
        plain = self.activation == "relu" and self.b1 is None and not (self.dropout and self.training)
        if plain and rows.sizes is not None and not autocasts(rows.x.device):
            return grouped_relu_mlp(rows.x, self.w1, self.w2, rows.sizes)
        ends = ends_of(rows)
        hidden = ACTIVATIONS[self.activation](grouped_linear(rows.x, rows, self.w1, self.b1, ends))
        hidden = F.dropout(hidden, self.dropout, self.training)
        return grouped_linear(hidden, rows, self.w2, self.b2, ends)


@register("gated_mlp")
class GatedMlp(_FeedForward):
    """``(act(x Wg) * (x W1)) W2``, SiLU by default (SwiGLU).

    `dropout` is the expert dropout, on the product. Weights are drawn as those of `mlp`.

    Raises:
        ValueError: sizes below 1, dropout outside [0, 1), an unknown activation, an init_scale not above 0.

    Source: arXiv 2002.05202 (GLU variants), equation 6.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        *,
        activation: Activation = "silu",
        bias: bool = False,
        dropout: float = 0.0,
        init_scale: float = 0.1,
    ) -> None:
        # Gate and value side by side: one product for both.
        super().__init__(d_model, d_ff, num_experts, 2 * d_ff, activation, bias, dropout, init_scale)

    def forward(self, rows: Rows) -> Float[Tensor, "*layout D"]:
        ends = ends_of(rows)
        hidden = gated(grouped_linear(rows.x, rows, self.w1, self.b1, ends), self.activation)
        hidden = F.dropout(hidden, self.dropout, self.training)
        return grouped_linear(hidden, rows, self.w2, self.b2, ends)
