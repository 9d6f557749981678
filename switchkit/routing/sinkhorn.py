"""Routers that even out the load by optimal transport, approximately."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from switchkit.records import Routing
from switchkit.registry import register
from switchkit.routing.base import LinearRouter, check_k, softmax, token_choice

__all__ = ["Sinkhorn", "sinkhorn"]


def sinkhorn(logits: Float[Tensor, "G S E"], valid: Bool[Tensor, "G S"], iterations: int) -> Float[Tensor, "G S E"]:
    """Log of ``exp(logits)`` with rows and columns scaled in turn, so that every expert gets an equal share.

    Real tokens have mass 1/n each and experts 1/E, up to one factor for the whole group. One iteration scales the rows,
    then the columns; it runs in logarithms, so that no logit is too large.
    """
    x = logits.permute(2, 0, 1)
    padding = ~valid
    columns = x.new_zeros(x.shape[0], x.shape[1], 1)
    rows = x.new_zeros(1, *x.shape[1:])
    for _ in range(iterations):
        rows = -(x + columns).logsumexp(0, keepdim=True)
        mass = (x + rows).masked_fill(padding, -torch.inf).logsumexp(-1, keepdim=True)
        # A group of padding only has no mass to even out.
        columns = torch.where(mass == -torch.inf, 0, -mass)
    return (x + rows + columns).permute(1, 2, 0)


@register("sinkhorn")
class Sinkhorn(LinearRouter):
    """The k best experts of a token after the scores of the group were evened out over the experts (S-BASE).

    In training Sinkhorn's iteration scales the rows and columns of ``exp(x W)`` until every real token of a group has
    the same mass and every expert too; the choice is the top k of the result and has no gradient. In evaluation, and
    where a group has one real token, it is the top k of the logits. Weights are of the raw logits: ``sigmoid`` for
    k = 1, for k >= 2 the ``softmax`` over all experts at the chosen ones. It balances by itself, though not exactly: no
    balance loss is needed.

    `iterations` is fixed, so that nothing waits for the device. Each ends with the experts, equal then;
    8 bring those of the tokens to within 2 % at logits with a standard deviation of 2 (4 % in a group of as few tokens
    as experts, 64). `jitter` as in `switch`.

    Elsewhere: Megatron-LM iterates until the scaling moves less than 1e-4, which waits for the device each time, over
    the micro-batch of a rank (here: over a group); it exponentiates first, which overflows float32 at logits above 88.

    Raises:
        ValueError: k outside 1 ... num_experts, iterations below 1, jitter outside [0, 1).

    Source: arXiv 2202.01169 (Unified Scaling Laws for Routed Language Models), S-BASE; `sinkhorn` of Megatron-LM.
    """

    leaks = "sinkhorn evens out the scores over all tokens of a group in training, later ones included"

    def __init__(self, d_model: int, num_experts: int, *, k: int = 1, iterations: int = 8, jitter: float = 0.0) -> None:
        super().__init__(d_model, num_experts, jitter=jitter)
        self.k = check_k(k, num_experts)
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1; got {iterations}. For none at all use top_k or switch")
        self.iterations = iterations

    def forward(
        self,
        tokens: Float[Tensor, "G S D"],
        limit: int | None,
        valid: Bool[Tensor, "G S"],
        ids: Int[Tensor, "G S"] | None = None,
    ) -> Routing:
        logits = self.logits(tokens)
        probs = softmax(logits)
        scores = logits.detach()
        if self.training:
            # Of one token alone all scores would be even, and the choice that of rounding.
            several = (valid.sum(-1) > 1).view(-1, 1, 1)
            scores = torch.where(several, sinkhorn(scores, valid, self.iterations), scores)
        expert = scores.topk(self.k, dim=-1).indices
        weight = (logits.sigmoid() if self.k == 1 else probs).gather(-1, expert)
        return token_choice(logits, probs, expert, weight, valid, extras=self.extras())
