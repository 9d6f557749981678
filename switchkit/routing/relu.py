"""Routers that let every expert decide by itself."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from switchkit.records import Routing
from switchkit.registry import register
from switchkit.routing.base import LinearRouter, check_k, softmax, token_choice

__all__ = ["ReLU"]


@register("relu")
class ReLU(LinearRouter):
    """Every expert whose logit is above zero, with that logit as its weight: ``relu(x W)`` (ReMoE).

    Continuous where a top k jumps: an expert comes and goes at weight 0. A token may choose any number of experts, none
    included. About half of them are active at first; an L1 term on `weight` with a coefficient that adapts brings the
    mean number down to `k`. Without that term nothing limits the cost.

    `k` is that mean, by which a capacity policy counts; 1 as in the paper's main comparison. The router itself does not
    enforce it.

    The record lists all E experts of every token, in order, so that its shape does not depend on the data; dispatchers
    compute nothing on the others, but hold a row for each. `probs` is the softmax of the logits, so that a balance loss
    reaches experts that are not active, and one that is active alone. What is exactly zero has no output and no
    gradient. `extras["k"]` is `k` as a number of the weights' type, for the L1 term's ``f_e = E / (k T) * active_e``.

    Raises:
        ValueError: k outside 1 ... num_experts.

    Source: arXiv 2412.14711 (ReMoE), section 3.
    """

    uneven = "relu lets a token choose any number of experts, and k is no more than the mean that it should come to"

    def __init__(self, d_model: int, num_experts: int, *, k: int = 1) -> None:
        super().__init__(d_model, num_experts)
        self.k = check_k(k, num_experts)

    def forward(
        self,
        tokens: Float[Tensor, "G S D"],
        limit: int | None,
        valid: Bool[Tensor, "G S"],
        ids: Int[Tensor, "G S"] | None = None,
    ) -> Routing:
        logits = self.logits(tokens)
        weight = logits.relu()
        expert = torch.arange(self.num_experts, device=logits.device).expand(logits.shape)
        extras = {**self.extras(), "k": torch.full((), self.k, dtype=weight.dtype, device=weight.device)}
        return token_choice(
            logits, softmax(logits), expert, weight, valid, chosen=weight > 0, extras=extras, ranked=False
        )
