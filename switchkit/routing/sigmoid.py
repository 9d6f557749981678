"""Token choice by independent affinities, balanced by a bias on the choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from switchkit.checks import finite_above
from switchkit.records import Routing
from switchkit.registry import register
from switchkit.routing.base import LinearRouter, check_k, softmax, token_choice
from switchkit.routing.grouping import check_groups, limit_to_groups

__all__ = ["Sigmoid"]

TINY = 1e-20
"""Keeps sums of affinities that underflow from dividing by zero."""


@register("sigmoid")
class Sigmoid(LinearRouter):
    """The k experts with the largest sigmoid affinity plus a bias, which steers the choice and never the weight.

    ``s = sigmoid(x W^T)``; the choice is the k largest of ``s + bias``; the weights are the s of the chosen ones,
    divided by their sum if `normalize`, times `scale`. `normalize` None means True for k >= 2 and False for k = 1,
    where dividing would leave the router without a gradient. `scale` makes up for a sum that is small beside shared
    experts (2.5 in the source). With `groups` > 1 a token chooses among the experts of the `top_groups` groups whose
    two best ``s + bias`` have the largest sum. `jitter` and `init_std` as in `switch`. `probs` of the record, for a
    balance loss, is s divided by its sum over all experts.

    `bias` [E] is a buffer that starts at zero, kept in checkpoints. Nothing here changes it: raise it for experts with
    too few tokens from outside, once per step. It stays float32 whatever the module is cast to, float64 included: in
    bfloat16, updates of 0.001 come to a halt at 0.5. With `bias` False there is none.

    Elsewhere: Megatron, torchtitan and OLMo-core update the bias, torchtitan centring the change; Hugging Face never
    does. litgpt masks the other groups with 0 in place of -inf, which a negative bias undercuts.

    Raises:
        ValueError: k outside 1 ... num_experts, scale not a finite number above 0, normalize=True with k = 1, groups
            that do not divide num_experts, too few experts left in top_groups, jitter outside [0, 1).

    Source: arXiv 2412.19437 (DeepSeek-V3), equations 12 to 16 and section 2.1.2.
    """

    bias: Tensor | None

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        k: int = 2,
        scale: float = 1.0,
        normalize: bool | None = None,
        groups: int = 1,
        top_groups: int | None = None,
        bias: bool = True,
        jitter: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        super().__init__(d_model, num_experts, jitter=jitter, init_std=init_std)
        self.k = check_k(k, num_experts)
        finite_above(0, scale=scale)
        if normalize and k == 1:
            raise ValueError(
                "normalize=True with k=1 makes every weight the same and leaves the router without a gradient: "
                "use False, or leave it out"
            )
        self.scale, self.normalize = scale, k > 1 if normalize is None else normalize
        self.groups, self.top_groups = groups, check_groups(groups, top_groups, k=k, num_experts=num_experts)
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32) if bias else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # What casts the module moves the bias, but leaves its dtype and values.
        if before is not None and self.bias is not None and self.bias.dtype != before.dtype:
            self.bias = before.to(self.bias.device)
        return self

    def forward(
        self,
        tokens: Float[Tensor, "G S D"],
        limit: int | None,
        valid: Bool[Tensor, "G S"],
        ids: Int[Tensor, "G S"] | None = None,
    ) -> Routing:
        logits = self.logits(tokens)
        affinity = logits.sigmoid()
        scores = affinity.detach()
        if self.bias is not None:
            scores = scores + self.bias
        if self.groups > 1:
            scores = limit_to_groups(scores, self.groups, self.top_groups, best=2)
        expert = scores.topk(self.k, dim=-1).indices
        weight = affinity.gather(-1, expert)
        if self.normalize:
            weight = weight / (weight.sum(-1, keepdim=True) + TINY)
        # s / sum s, in logarithms: it adds up to 1, and its gradient is finite, where every s underflows too.
        probs = softmax(F.logsigmoid(logits))
        return token_choice(logits, probs, expert, self.scale * weight, valid, extras=self.extras())
