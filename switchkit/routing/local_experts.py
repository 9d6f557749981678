"""The mixture of 1991, where every expert sees every token."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from switchkit.records import Routing
from switchkit.registry import register
from switchkit.routing.base import LinearRouter, softmax, token_choice

__all__ = ["LocalExperts", "competing_loss", "cooperative_loss"]


@register("local_experts")
class LocalExperts(LinearRouter):
    """Every token goes to all experts, weighted by the softmax: a dense mixture, the baseline of all sparse ones.

    `k` is num_experts. A layer with it mixes the outputs, which is the source's cooperative error;
    `competing_loss` beside this class is the one that it recommends, for outputs of the experts one by one.

    Source: Jacobs, Jordan, Nowlan and Hinton, "Adaptive Mixtures of Local Experts", Neural Computation 3 (1991).
    """

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts)
        self.k = num_experts

    def forward(
        self,
        tokens: Float[Tensor, "G S D"],
        limit: int | None,
        valid: Bool[Tensor, "G S"],
        ids: Int[Tensor, "G S"] | None = None,
    ) -> Routing:
        logits = self.logits(tokens)
        probs = softmax(logits)
        expert = torch.arange(self.num_experts, device=tokens.device).expand(probs.shape)
        return token_choice(logits, probs, expert, probs, valid, extras=self.extras(), ranked=False)


def competing_loss(
    outputs: Float[Tensor, "T E D"], probs: Float[Tensor, "T E"], target: Float[Tensor, "T D"]
) -> Float[Tensor, ""]:
    """Mean over T cases of ``-log sum_e p_e exp(-|d - o_e|^2 / 2)``: each expert answers for the whole target.

    Its gradient is the largest for the expert that is best already, so that experts part ways and specialise. Targets
    should be scaled so that an error of 1 is a normal one.

    Source: Jacobs et al. (1991), equation 1.3.
    """
    error = (target.unsqueeze(1) - outputs).square().sum(-1)
    # A probability that underflows would turn the gradient of its logarithm into NaN.
    log_probs = probs.clamp(min=torch.finfo(probs.dtype).tiny).log()
    return -(log_probs - error / 2).logsumexp(1).mean()


def cooperative_loss(
    outputs: Float[Tensor, "T E D"], probs: Float[Tensor, "T E"], target: Float[Tensor, "T D"]
) -> Float[Tensor, ""]:
    """Mean over T cases of ``|d - sum_e p_e o_e|^2``: each expert mends what the others leave over, and all depend on
    one another.

    Source: Jacobs et al. (1991), equation 1.1.
    """
    return (target - (probs.unsqueeze(-1) * outputs).sum(1)).square().sum(-1).mean()
