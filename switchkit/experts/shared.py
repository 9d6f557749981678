"""Experts that every token meets, beside the routed ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from switchkit.checks import one_of
from switchkit.experts.base import Experts, ExpertsFactory, init_linear
from switchkit.experts.feed_forward import GatedMlp
from switchkit.records import Rows
from switchkit.registry import register

__all__ = ["Shared"]


@register("shared")
class Shared(Experts):
    """Routed experts, and `num_shared` more of the same kind that every token meets.

    The shared ones are computed as one expert of width ``num_shared * width``, which is the same thing. `mix` puts both
    together: "sum" (DeepSeek), "gate": ``routed + sigmoid(x Wg) * shared`` (Qwen2-MoE), or "learned":
    ``a * routed + (1 - a) * shared`` with ``a = softmax(x Wm)[0]`` (PR-MoE in DeepSpeed).

    Args:
        d_model: width of a token.
        d_ff: hidden width of a routed expert.
        num_experts: routed experts.
        experts: builds both kinds; null: `gated_mlp`, as in the models that have shared experts.
        num_shared: experts that every token meets.
        width: hidden width of one of them; null: d_ff.
        mix: "sum", "gate" or "learned".

    Elsewhere: OLMo-core weighs both parts, ``shared / (k + 1) + routed * k / (k + 1)``; OpenMoE adds a dense layer of
    full width beside the mixture (`num_shared: 1` with that width).

    Raises:
        ValueError: num_shared or width below 1, another word for `mix`.

    Source: arXiv 2401.06066 (DeepSeekMoE), equation 9; arXiv 2201.05596 (DeepSpeed-MoE), section 4.1.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        *,
        experts: ExpertsFactory | None = None,
        num_shared: int = 1,
        width: int | None = None,
        mix: Literal["sum", "gate", "learned"] = "sum",
    ) -> None:
        super().__init__(d_model, d_ff, num_experts)
        width = d_ff if width is None else width
        for name, value in (("num_shared", num_shared), ("width", width)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}. Take the routed experts alone instead")
        one_of("mix", mix, ("sum", "gate", "learned"))
        make = experts or GatedMlp
        self.routed = make(d_model=d_model, d_ff=d_ff, num_experts=num_experts)
        self.shared = make(d_model=d_model, d_ff=num_shared * width, num_experts=1)
        self.how = mix
        outputs = {"sum": 0, "gate": 1, "learned": 2}[mix]
        self.mix_weight = nn.Parameter(torch.empty(outputs, d_model)) if outputs else None
        if self.mix_weight is not None:
            init_linear(self.mix_weight, d_model)

    def forward(self, rows: Rows) -> Float[Tensor, "*layout D"]:
        return self.routed(rows)

    def always(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        flat = x.flatten(0, 1).unsqueeze(0)
        load = torch.full((1,), flat.shape[1], device=x.device)
        return self.shared(Rows(x=flat, load=load)).view(x.shape)

    def mix(
        self, routed: Float[Tensor, "B S D"], always: Float[Tensor, "B S D"], x: Float[Tensor, "B S D"]
    ) -> Float[Tensor, "B S D"]:
        if self.mix_weight is None:
            return routed + always
        logits = nn.functional.linear(x, self.mix_weight.to(x.dtype))
        if self.how == "gate":
            return routed + torch.sigmoid(logits) * always
        share = logits.softmax(-1)
        return share[..., :1] * routed + share[..., 1:] * always

    def always_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.shared.parameters()
        if self.mix_weight is not None:
            yield self.mix_weight
