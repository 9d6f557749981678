"""The router of BASE layers: an exactly even load."""

from __future__ import annotations

import importlib

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from switchkit.records import Routing
from switchkit.registry import register
from switchkit.routing.base import LinearRouter, best_expert, softmax, token_choice

__all__ = ["Base", "balanced_assignment"]


@register("base")
class Base(LinearRouter):
    """Each token goes to one expert such that all experts get equally many and the total score is the highest (BASE).

    In training the real tokens of a group are assigned by an exact linear assignment on the logits: every expert gets
    n/E of the n tokens, rounded down or up. In evaluation a token takes its best expert. The weight is
    ``sigmoid(logit)``, so that with the residual around the layer a token becomes ``x + sigmoid(logit) * E(x)``. No
    balance loss is needed.

    The assignment is solved by SciPy on the host: one wait for the device per layer in training, and a time that grows
    with the cube of a group's tokens. `sinkhorn` is the approximation without either.

    Elsewhere: fairseq uses an auction that stops within a tolerance of the optimum, shuffles the tokens of all workers
    into each group first, and starts from orthogonal expert vectors.

    Raises:
        ImportError: in training, where SciPy is not installed.

    Source: arXiv 2103.16716, section 3.
    """

    leaks = "base assigns all tokens of a group jointly in training, later ones included"

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts)

    def forward(
        self,
        tokens: Float[Tensor, "G S D"],
        limit: int | None,
        valid: Bool[Tensor, "G S"],
        ids: Int[Tensor, "G S"] | None = None,
    ) -> Routing:
        logits = self.logits(tokens)
        scores = logits.detach()
        expert = balanced_assignment(scores, valid).unsqueeze(-1) if self.training else best_expert(scores)
        weight = logits.sigmoid().gather(-1, expert)
        return token_choice(logits, softmax(logits), expert, weight, valid, extras=self.extras())


# One operator, so that torch.compile takes it as it is; it waits for the device, which CUDA graphs cannot record.
@torch.library.custom_op("switchkit::balanced_assignment", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def balanced_assignment(scores: Tensor, valid: Tensor) -> Tensor:
    """The expert of each token [G, S] for scores [G, S, E]: the best total at equal loads; 0 for padding.

    Raises:
        ImportError: SciPy is not installed.
    """
    try:
        solve = importlib.import_module("scipy.optimize").linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            "router 'base' solves its assignment with SciPy in training: pip install 'switchkit[base]'"
        ) from error
    groups, size, experts = scores.shape
    expert = np.zeros((groups, size), dtype=np.int64)
    table, real = scores.double().cpu().numpy(), valid.cpu().numpy()
    for g in range(groups):
        # What is not finite is reported by its owner, after the step: the solver must not stop on it.
        mine = np.nan_to_num(table[g, real[g]], nan=0.0, posinf=1e30, neginf=-1e30)
        count = len(mine)
        if count == 0:
            continue
        # Each expert has n // E places that must be taken and one that may be; rows without a token fill what is left
        # of the latter, for nothing.
        fixed = count // experts
        owner = np.concatenate([np.repeat(np.arange(experts), fixed), np.arange(experts)])
        cost = np.zeros((len(owner), len(owner)))
        cost[:count] = -mine[:, owner]
        cost[count:, : experts * fixed] = np.inf
        expert[g, real[g]] = owner[solve(cost)[1][:count]]
    return torch.from_numpy(expert).to(scores.device)


@balanced_assignment.register_fake
def _(scores: Tensor, valid: Tensor) -> Tensor:
    return scores.new_empty(scores.shape[:2], dtype=torch.long)
