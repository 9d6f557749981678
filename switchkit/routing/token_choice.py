"""Routers where each token chooses its experts by a learned score."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from switchkit.records import Routing
from switchkit.registry import register
from switchkit.routing.base import LinearRouter, check_k, softmax, token_choice

__all__ = ["Switch", "TopK"]


@register("switch")
class Switch(LinearRouter):
    """The best expert of a token, weighted by its raw probability, so that the router gets a gradient.

    Exploration happens in training only: `jitter` multiplies the router's input by U[1-jitter, 1+jitter],
    `input_dropout` drops entries of it, `sample` draws the expert from ``softmax(logits / temperature)`` instead of
    taking the best. The paper found jitter best (its Table 11); all are off by default, as small models need none.

    Raises:
        ValueError: jitter or input_dropout outside [0, 1), temperature not above 0, a temperature without sampling.

    Source: arXiv 2101.03961, equations 1 and 2 and appendix C.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        jitter: float = 0.0,
        input_dropout: float = 0.0,
        sample: bool = False,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(d_model, num_experts, jitter=jitter)
        if not 0 <= input_dropout < 1:
            raise ValueError(f"input_dropout must be in [0, 1); got {input_dropout}")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number > 0; got {temperature}")
        if temperature != 1 and not sample:
            raise ValueError(f"temperature={temperature} does nothing without sample=True: set it, or leave it out")
        self.input_dropout, self.sample, self.temperature = input_dropout, sample, temperature

    def forward(
        self,
        tokens: Float[Tensor, "G S D"],
        limit: int | None,
        valid: Bool[Tensor, "G S"],
        ids: Int[Tensor, "G S"] | None = None,
    ) -> Routing:
        logits = self.logits(F.dropout(tokens, self.input_dropout, self.training))
        probs = softmax(logits)
        if self.training and self.sample:
            # Gumbel's trick: the largest of (logit / temperature + Gumbel noise) is a draw from the softmax.
            scores = logits / self.temperature - torch.empty_like(logits).exponential_().log()
        else:
            scores = logits
        # Along the layout of the logits `max` takes a tenth of the time of `argmax` on a CPU.
        expert = scores.detach().permute(2, 0, 1).max(0).indices.unsqueeze(-1)
        return token_choice(logits, probs, expert, probs.gather(-1, expert), valid)


@register("top_k")
class TopK(LinearRouter):
    """The k best experts of a token by softmax probability.

    `normalize` divides the k weights by their sum, before any drop; None means yes for k >= 2 and no for k = 1, where
    it would leave the router without a gradient. `jitter` as in `switch`.

    Raises:
        ValueError: k outside 1 ... num_experts, jitter outside [0, 1), normalize=True with k = 1.

    Source: arXiv 2006.16668 (k = 2), arXiv 2401.04088 (equations 1 to 3, Mixtral).
    """

    def __init__(
        self, d_model: int, num_experts: int, *, k: int = 2, normalize: bool | None = None, jitter: float = 0.0
    ) -> None:
        super().__init__(d_model, num_experts, jitter=jitter)
        self.k = check_k(k, num_experts)
        if normalize and k == 1:
            raise ValueError("normalize=True with k=1 makes every weight 1 and leaves the router without a gradient")
        self.normalize = k > 1 if normalize is None else normalize

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
        if self.normalize:
            weight = weight / weight.sum(-1, keepdim=True)
        return token_choice(logits, probs, expert, weight, valid)
