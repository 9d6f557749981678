"""Routers whose experts work on mixtures of tokens."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from switchkit.checks import at_least
from switchkit.records import Routing
from switchkit.registry import register
from switchkit.routing.base import Router, full_precision

__all__ = ["Soft", "soft"]


def soft(
    logits: Float[Tensor, "G S M"], valid: Bool[Tensor, "G S"]
) -> tuple[Float[Tensor, "G S M"], Float[Tensor, "G S M"]]:
    """Dispatch weights (softmax over the real tokens) and combine weights (softmax over the M slots).

    Dispatch weights of padding are 0, and so are all of a group that holds nothing else.
    """
    padding = ~valid.unsqueeze(-1)
    # The lowest number rather than -inf: where all is padding, a softmax of the latter is NaN.
    dispatch = logits.masked_fill(padding, torch.finfo(logits.dtype).min).softmax(1).masked_fill(padding, 0)
    return dispatch, logits.softmax(-1)


@register("soft")
class Soft(Router):
    """Each expert works on `slots` mixtures of all tokens, and each token gets a mixture of all their outputs.

    ``logits = x Phi`` [S, E*P] with one vector of Phi per slot; slot j holds ``sum_s D[s, j] x_s`` with D the softmax
    of the logits over the tokens, and token s gets ``sum_j C[s, j] y_j`` with C their softmax over the slots. Nothing
    is selected and nothing dropped: all is differentiable. With `normalize`, x and the vectors of Phi have length 1 and
    Phi a learned scale, without which the softmax saturates in wide models.

    `slots`: P, slots of an expert, as many as Phi has vectors and so fixed when built; a capacity policy has no say.
    Experts compute on E*P rows of each group, whatever its length. The paper finds one or two slots per expert best.

    The record holds all S*E*P pairs of a token and a slot, token by token: `weight` is C, `share` is D. `logits` are
    the logsumexp over an expert's slots, and `probs` the sums of C over them.

    Elsewhere: V-MoE takes the number of slots from a capacity factor of 1 and the sequence it is initialised with,
    where it is not given.

    Raises:
        ValueError: slots below 1.

    Source: arXiv 2308.00951, section 2, algorithms 1 and 2.
    """

    leaks = "soft mixes all tokens of a group, later ones included, into every slot"
    full = True
    uneven = "soft computes the same rows for a sequence of any length"

    def __init__(self, d_model: int, num_experts: int, *, slots: int = 1, normalize: bool = True) -> None:
        super().__init__(d_model, num_experts)
        at_least(1, slots=slots)
        self.slots, self.normalize = slots, normalize
        # Every token reaches every expert.
        self.k = num_experts
        self.phi = nn.Parameter(torch.empty(num_experts, slots, d_model))
        self.scale = nn.Parameter(torch.empty(())) if normalize else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # LeCun's, as in the authors' code (vmoe/projects/soft_moe/router.py); the scale starts at 1.
        std = math.sqrt(1 / self.d_model)
        nn.init.trunc_normal_(self.phi, std=std, a=-2 * std, b=2 * std)
        if self.scale is not None:
            nn.init.ones_(self.scale)

    def forward(
        self,
        tokens: Float[Tensor, "G S D"],
        limit: int | None,
        valid: Bool[Tensor, "G S"],
        ids: Int[Tensor, "G S"] | None = None,
    ) -> Routing:
        groups, size, _ = tokens.shape
        experts, slots = self.num_experts, self.slots
        with full_precision(tokens.device):
            x = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
            phi = self.phi.to(x.dtype).flatten(0, 1)
            if self.scale is not None:
                x, phi = _unit(x), _unit(phi) * self.scale.to(x.dtype)
            by_slot = x @ phi.t()
        dispatch, combine = soft(by_slot, valid)
        by_expert, pairs = (groups, size, experts, slots), (groups, size * experts * slots)
        place = torch.arange(pairs[1], device=x.device)
        chosen = valid.repeat_interleave(experts * slots, dim=1)
        return Routing(
            logits=by_slot.view(by_expert).logsumexp(-1),
            probs=combine.view(by_expert).sum(-1),
            token=(place // (experts * slots)).expand(pairs),
            expert=(place // slots % experts).expand(pairs),
            weight=combine.reshape(pairs),
            chosen=chosen,
            valid=valid,
            k=experts * slots,
            ranked=False,
            capacity=slots,
            slot=(place % slots).expand(pairs),
            kept=chosen,
            load=(valid.sum(-1, keepdim=True) * slots).expand(groups, experts),
            share=dispatch.reshape(pairs),
        )

    def rows(self, size: int, limit: int | None) -> int:
        """Those of the slots, for a group of any size."""
        return self.num_experts * self.slots


def _unit(x: Float[Tensor, "*any D"]) -> Float[Tensor, "*any D"]:
    """Vectors of length 1; zero stays zero, with a finite gradient."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
