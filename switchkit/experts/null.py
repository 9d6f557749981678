"""Experts that cost next to nothing."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from switchkit.checks import at_least
from switchkit.experts.base import Experts, ExpertsFactory, expert_of_row, init_linear
from switchkit.experts.feed_forward import Mlp
from switchkit.records import Rows
from switchkit.registry import register

__all__ = ["Null"]


@register("null")
class Null(Experts):
    """Feed-forward experts first, then `zero`, `copy` and `constant` ones, so that a token may buy less computation.

    A zero expert returns 0 (the token's residual is all that remains), a copy expert the token itself, a constant
    expert ``a x + (1 - a) v`` with a learned vector v and ``a = softmax(x Wc)[0]``. Of the layer's `num_experts`,
    ``zero + copy + constant`` are of these kinds. Every expert counts alike for the router, the capacity and the
    losses; the paper also gives the null kinds another share of the balance loss, which is left out here.

    Args:
        d_model: width of a token.
        d_ff: hidden width of a feed-forward expert.
        num_experts: experts of all kinds.
        experts: builds the feed-forward ones; null: `mlp`.
        zero: experts that return nothing; 1 each of zero and copy by default, where there are more than two experts.
        copy: experts that return the token.
        constant: experts that return a mix of the token and a learned vector.

    Elsewhere: LongCat-Flash has copy experts alone.

    Raises:
        ValueError: a negative number, or no feed-forward expert left.

    Source: arXiv 2410.07348 (MoE++), equations 3 to 5.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        *,
        experts: ExpertsFactory | None = None,
        zero: int | None = None,
        copy: int | None = None,
        constant: int = 0,
    ) -> None:
        super().__init__(d_model, d_ff, num_experts)
        few = num_experts < 3
        self.zero = (0 if few else 1) if zero is None else zero
        self.copy = (0 if few else 1) if copy is None else copy
        self.constant = constant
        kinds = {"zero": self.zero, "copy": self.copy, "constant": self.constant}
        at_least(0, **kinds)
        self.full = num_experts - sum(kinds.values())
        if self.full < 1:
            raise ValueError(
                f"{' + '.join(f'{n}={v}' for n, v in kinds.items())} leaves {self.full} feed-forward experts of "
                f"num_experts={num_experts}: at least 1 must remain"
            )
        self.routed = (experts or Mlp)(d_model=d_model, d_ff=d_ff, num_experts=self.full)
        self.vector = nn.Parameter(torch.empty(constant, d_model)) if constant else None
        self.gate = nn.Parameter(torch.empty(constant, 2, d_model)) if constant else None
        if self.vector is not None and self.gate is not None:
            nn.init.normal_(self.vector, std=0.02)
            init_linear(self.gate, d_model)

    def forward(self, rows: Rows) -> Float[Tensor, "*layout D"]:
        expert = expert_of_row(rows).unsqueeze(-1)
        first_copy = self.full + self.zero
        first_constant = first_copy + self.copy
        y = self._full(rows)
        y = y + rows.x.masked_fill((expert < first_copy) | (expert >= first_constant), 0)
        if self.vector is not None and self.gate is not None:
            mine = (expert >= first_constant) & (expert < self.num_experts)
            index = (expert.squeeze(-1) - first_constant).clamp(0, self.constant - 1)
            gate = self.gate.to(y.dtype)[index]
            share = torch.einsum("...cd,...d->...c", gate, rows.x).softmax(-1)
            constant = share[..., :1] * rows.x + share[..., 1:] * self.vector.to(y.dtype)[index]
            y = y + constant.masked_fill(~mine, 0)
        return y

    def _full(self, rows: Rows) -> Float[Tensor, "*layout D"]:
        """The feed-forward experts on their rows, zeros elsewhere."""
        load = rows.load[: self.full]
        sizes = None if rows.sizes is None else rows.sizes[: self.full]
        if rows.x.dim() == 2:
            return self.routed(replace(rows, load=load, sizes=sizes))
        y = self.routed(replace(rows, x=rows.x[: self.full], load=load, sizes=sizes))
        return torch.cat([y, y.new_zeros(self.num_experts - self.full, *y.shape[1:])])
