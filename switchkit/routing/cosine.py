"""Token choice by the angle between a token and an expert."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from switchkit.checks import finite_above
from switchkit.records import Routing
from switchkit.registry import register
from switchkit.routing.base import Router, check_k, full_precision, softmax, token_choice
from switchkit.routing.token_choice import Normalize, check_normalize

__all__ = ["Cosine"]

COLDEST = 0.01


@register("cosine")
class Cosine(Router):
    """The k best experts of a token by the cosine between its projection and each expert's vector.

    ``logits = cos(P x, e_i) / temperature``, then as `top_k`, `normalize` included. `width` is that of the projection;
    None: half of d_model, 256 at most. The temperature is learned as ``0.01 + exp(log_temperature)``, so that it can
    neither reach zero nor stop learning; `temperature` is where it starts. The norm of a token has no influence: large
    activations cannot win a token for an expert, nor pull its representation towards the expert's vector.

    Elsewhere: Tutel's projection has a bias, starts at a temperature of 0.5 and clips it at 0.01, below which it has
    no gradient.

    Raises:
        ValueError: k outside 1 ... num_experts, width below 1, temperature not a finite number above 0.01, an unknown
            word for normalize, normalize="before" or "after" with k = 1.

    Source: arXiv 2204.09179 (X-MoE), section 3.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        k: int = 2,
        width: int | None = None,
        temperature: float = 0.07,
        normalize: Normalize | None = None,
    ) -> None:
        super().__init__(d_model, num_experts)
        self.k = check_k(k, num_experts)
        self.normalize = check_normalize(normalize, k)
        if width is not None and width < 1:
            raise ValueError(f"width must be at least 1, or null for half of d_model; got {width}")
        finite_above(COLDEST, temperature=temperature)
        self.width = min(max(d_model // 2, 1), 256) if width is None else width
        self.temperature = temperature
        self.projection = nn.Parameter(torch.empty(self.width, d_model))
        self.embedding = nn.Parameter(torch.empty(num_experts, self.width))
        self.log_temperature = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.projection, std=self.d_model**-0.5)
        nn.init.normal_(self.embedding, std=self.width**-0.5)
        nn.init.constant_(self.log_temperature, math.log(self.temperature - COLDEST))

    def forward(
        self,
        tokens: Float[Tensor, "G S D"],
        limit: int | None,
        valid: Bool[Tensor, "G S"],
        ids: Int[Tensor, "G S"] | None = None,
    ) -> Routing:
        logits = self.logits(tokens)
        probs = softmax(logits)
        weight, expert = probs.topk(self.k, dim=-1)
        if self.normalize == "before":
            weight = weight / weight.sum(-1, keepdim=True)
        return token_choice(logits, probs, expert, weight, valid, renormalize=self.normalize == "after")

    def logits(self, tokens: Float[Tensor, "G S D"]) -> Float[Tensor, "G S E"]:
        """Cosine over temperature, in float32 or better, experts first in memory."""
        with full_precision(tokens.device):
            dtype = torch.promote_types(tokens.dtype, torch.float32)
            x = torch.mm(self.projection.to(dtype), tokens.to(dtype).flatten(0, 1).t())
            # A floor under the norms bounds the gradient of a token of zeros.
            cosine = torch.mm(_unit(self.embedding.to(dtype), 1), _unit(x, 0))
            logits = cosine / (COLDEST + self.log_temperature.to(dtype).exp())
            return logits.view(self.num_experts, *tokens.shape[:2]).permute(1, 2, 0)


def _unit(x: Float[Tensor, "A B"], dim: int) -> Float[Tensor, "A B"]:
    return F.normalize(x, dim=dim, eps=1e-6)
