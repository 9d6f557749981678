"""Routers where each expert chooses its tokens."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from switchkit.records import Routing
from switchkit.registry import register
from switchkit.routing.base import LinearRouter, softmax

__all__ = ["ExpertChoice", "expert_choice"]


def expert_choice(probs: Float[Tensor, "G S E"], valid: Bool[Tensor, "G S"], size: int) -> Int[Tensor, "G E C"]:
    """The `size` tokens of a group with the highest probability of each expert, best first, padding behind them."""
    # Real probabilities are not below 0, so padding is taken only where real tokens run out.
    scores = probs.detach().masked_fill(~valid.unsqueeze(-1), -1)
    return scores.transpose(1, 2).topk(size, dim=-1).indices


@register("expert_choice")
class ExpertChoice(LinearRouter):
    """Each expert takes the tokens of the group that like it best, so that every expert is full.

    ``p = softmax(x W)`` over the experts; expert e takes the C tokens with the largest ``p[:, e]``, weighted by that
    raw probability. A token may be taken by every expert, or by none. C is the capacity policy's limit; where that is
    dropless, ``ceil(capacity_factor * S / E)``; never more than the S tokens of the group, padding counted as in every
    capacity. An expert takes fewer where real tokens run out.

    `capacity_factor` is the mean number of experts of a token; 2 is the paper's default. `jitter` as in `switch`.

    Elsewhere: Mesh TensorFlow and flaxformer take the capacity from their train and eval factors; V-MoE adds Gaussian
    noise to the logits in training. The paper also tries to cap the experts of a token, by a linear program.

    Raises:
        ValueError: a capacity_factor that is not a finite number above 0, jitter outside [0, 1).

    Source: arXiv 2202.09368, section 3.2, equation 1.
    """

    leaks = "expert_choice compares all tokens of a group, later ones included, before an expert takes its own"
    full = True

    def __init__(self, d_model: int, num_experts: int, *, capacity_factor: float = 2.0, jitter: float = 0.0) -> None:
        super().__init__(d_model, num_experts, jitter=jitter)
        if not (math.isfinite(capacity_factor) and capacity_factor > 0):
            raise ValueError(
                f"capacity_factor must be a finite number > 0, the mean number of experts of a token; "
                f"got {capacity_factor}"
            )
        self.capacity_factor = capacity_factor
        # Read from the decimal form, so that 1.2 is 6/5 and no rounding adds a slot.
        self._ratio = Fraction(str(capacity_factor)).as_integer_ratio()
        self.k = min(num_experts, max(1, round(capacity_factor)))

    def forward(
        self,
        tokens: Float[Tensor, "G S D"],
        limit: int | None,
        valid: Bool[Tensor, "G S"],
        ids: Int[Tensor, "G S"] | None = None,
    ) -> Routing:
        groups, size, _ = tokens.shape
        logits = self.logits(tokens)
        probs = softmax(logits)
        capacity = self._capacity(size, limit)
        token = expert_choice(probs, valid, capacity)
        weight = probs.transpose(1, 2).gather(-1, token).flatten(1)
        token = token.flatten(1)
        chosen = valid.gather(1, token)
        place = torch.arange(self.num_experts * capacity, device=token.device)
        # A group without tokens has capacity 0, by which nothing can be divided.
        return Routing(
            logits=logits,
            probs=probs,
            token=token,
            expert=(place // max(1, capacity)).expand_as(token),
            weight=weight,
            chosen=chosen,
            valid=valid,
            capacity=capacity,
            slot=(place % max(1, capacity)).expand_as(token),
            kept=chosen,
            load=chosen.view(groups, self.num_experts, capacity).sum(-1),
            extras=self.extras(),
        )

    def rows(self, size: int, limit: int | None) -> int:
        """Every expert is full."""
        return self.num_experts * self._capacity(size, limit)

    def _capacity(self, size: int, limit: int | None) -> int:
        if limit is None:
            limit = -(-self._ratio[0] * size // (self._ratio[1] * self.num_experts))
        return min(limit, size)
